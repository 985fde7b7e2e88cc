"""Words that the rules know: which may go, which may come, which may stand for another; English, and all our choice.

Knows no rule. No word here praises or blames, and none negates.
"""

from __future__ import annotations

KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
"""Rows of a keyboard."""

DROPPED = frozenset({
    "a", "an", "the", "of", "is", "are", "was", "were", "be", "been", "am", "this", "that", "these", "those", "it",
    "its", "which", "who", "there", "and", "then", "just", "also",
})  # fmt: skip
"""Words without which a sentence still says the same."""

NEGATIONS = frozenset({
    "no", "not", "n't", "nor", "never", "none", "nothing", "nobody", "nowhere", "neither", "cannot", "without",
    "hardly", "barely", "scarcely",
})  # fmt: skip
"""Words that turn a meaning round; also every word that ends in n't."""

ADDED = ("indeed", "actually", "now", "then", "here", "also", "again", "basically")
"""Words that add nothing."""

SYNONYMS = {
    "movie": "film", "movies": "films", "film": "movie", "films": "movies", "actor": "performer",
    "actors": "performers", "audience": "viewers", "viewers": "audience", "director": "filmmaker",
    "directors": "filmmakers", "script": "screenplay", "screenplay": "script", "story": "tale", "tale": "story",
    "plot": "storyline", "storyline": "plot", "kids": "children", "children": "kids", "people": "folks",
    "company": "firm", "companies": "firms", "firm": "company", "nation": "country", "country": "nation",
    "countries": "nations", "job": "occupation", "jobs": "occupations", "doctor": "physician", "doctors": "physicians",
    "car": "automobile", "cars": "automobiles", "phone": "telephone", "photo": "photograph", "photos": "photographs",
    "ads": "advertisements", "tv": "television", "said": "stated", "says": "states", "begin": "start",
    "begins": "starts", "began": "started", "start": "begin", "starts": "begins", "started": "began", "buy": "purchase",
    "buys": "purchases", "bought": "purchased", "purchase": "buy", "help": "assist", "helps": "assists",
    "helped": "assisted", "happen": "occur", "happens": "occurs", "happened": "occurred", "occur": "happen",
    "occurs": "happens", "occurred": "happened", "located": "situated", "big": "large", "large": "big",
    "whole": "entire", "entire": "whole", "many": "numerous", "several": "various", "quickly": "rapidly",
    "rapidly": "quickly",
    "usually": "normally", "normally": "usually", "often": "frequently", "frequently": "often", "almost": "nearly",
    "nearly": "almost", "maybe": "perhaps", "perhaps": "maybe", "although": "though", "though": "although",
    "among": "amongst", "toward": "towards", "towards": "toward", "until": "till",
    "however": "nevertheless", "nevertheless": "however", "mainly": "chiefly", "mostly": "mainly",
}  # fmt: skip
"""A word that may stand for another, where neither praises nor blames."""

CONTRACTIONS = {
    "do not": "don't", "does not": "doesn't", "did not": "didn't", "is not": "isn't", "are not": "aren't",
    "was not": "wasn't", "were not": "weren't", "has not": "hasn't", "have not": "haven't", "had not": "hadn't",
    "will not": "won't", "would not": "wouldn't", "could not": "couldn't", "should not": "shouldn't",
    "cannot": "can't", "i am": "i'm", "you are": "you're", "we are": "we're", "they are": "they're",
    "i have": "i've", "you have": "you've", "we have": "we've", "they have": "they've", "i will": "i'll",
    "you will": "you'll", "we will": "we'll", "they will": "they'll",
}  # fmt: skip
"""The long form and the short one, of which each follows from the other."""

FRAMES = ("that is, ", "in short, ", "put simply, ", "in other words, ", "to put it differently, ")
"""What may stand before a sentence that says a thing again."""

CLEFTS = ("it is the case that ", "the fact is that ", "it so happens that ")
"""What may stand before a statement and leave it one."""

ASKED = "the question is this: "
"""The same before a question."""

QUESTIONS = frozenset({
    "what", "who", "whom", "whose", "when", "where", "why", "how", "which", "is", "are", "was", "were", "do", "does",
    "did", "can", "could", "name",
})  # fmt: skip
"""How a question begins."""

JOINING = ("because", "although", "though", "while", "when", "if", "since", "unless")
"""What a clause begins with that may stand before or behind the main one."""

LOWERED = frozenset({
    *DROPPED, *QUESTIONS, *JOINING,
    "he", "she", "we", "you", "they", "my", "our", "your", "his", "her", "their", "in", "on", "at", "for", "with",
    "as", "by", "from", "to", "but", "or", "if", "so", "some", "all", "each", "every", "no", "not", "one", "two",
    "three", "here", "now", "after", "before", "during", "under", "over", "about", "what's", "it's", "that's",
    "there's",
})  # fmt: skip
"""Words that lose their capital where a sentence no longer begins with them; others may be names."""


def negates(word: str) -> bool:
    """Whether a word, in lower case, turns a meaning round."""
    word = word.strip(".,;:!?\"'()").replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return word in NEGATIONS or word.endswith("n't")
