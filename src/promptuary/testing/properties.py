"""The table of the contract: every property by name, where it applies, and how declared exceptions are judged.

Knows no method by name; what a property does stands in `learning.py` and `behaviour.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from promptuary import registry
from promptuary.errors import PromptuaryError
from promptuary.methods.base import Method
from promptuary.testing import behaviour, learning, tiny
from promptuary.testing.case import Case


@dataclass(frozen=True)
class Property:
    """One line of the contract.

    `check` raises when it does not hold; `ability`: a family must have it ("generate"), or None for every family;
    `card`: whether it is about the method's card, and left out where none is given; `tensors`: whether it is about
    trained tensors, which a prompt of words has none of.
    """

    check: Callable[[Case], None]
    ability: str | None = None
    card: bool = False
    tensors: bool = False

    @property
    def name(self) -> str:
        """The name of the function, which reads as a sentence."""
        return self.check.__name__

    @property
    def summary(self) -> str:
        """What it checks, in one line."""
        return (self.check.__doc__ or "").strip().splitlines()[0]

    def applies(self, method: type[Method], family: str, *, card: bool) -> bool:
        """Whether the family can be asked, and the method has what is asked about."""
        if (self.card and not card) or (self.tensors and "text" in method.sites):
            return False
        kind = tiny.family_name(family)
        return self.ability is None or self.ability in registry.load("backbones", kind).abilities


PROPERTIES: dict[str, Property] = {
    one.name: one
    for one in (
        Property(learning.builds_from_widths_only),
        Property(learning.parameter_count_is_the_stated_formula),
        Property(learning.only_declared_parameters_get_gradients, tensors=True),
        Property(learning.backbone_bytes_are_unchanged_by_training),
        Property(learning.loss_falls_on_the_toy_task, tensors=True),
        Property(learning.same_seed_gives_same_bytes),
        Property(learning.saved_prompt_predicts_the_same),
        Property(learning.another_base_is_refused),
        Property(behaviour.folded_equals_live),
        Property(behaviour.padding_on_either_side_changes_nothing),
        Property(behaviour.a_row_of_a_batch_equals_that_row_alone),
        Property(behaviour.row_order_is_irrelevant),
        Property(behaviour.rows_with_different_prompts_equal_separate_runs),
        Property(behaviour.cached_generation_equals_uncached, ability="generate"),
        Property(behaviour.second_turn_equals_fresh, ability="generate"),
        Property(behaviour.detaching_restores_the_base),
        Property(learning.accumulation_equals_the_big_batch, tensors=True),
        Property(learning.forward_only_under_evolution, tensors=True),
        Property(learning.a_resumed_run_equals_the_unbroken_one, tensors=True),
        Property(behaviour.every_switch_off_gives_the_same),
        Property(behaviour.changed_tensors_count_at_once),
        Property(behaviour.mixed_precision_is_finite),
        Property(learning.settings_survive_yaml),
        Property(learning.an_unknown_field_is_refused_with_a_suggestion),
        Property(learning.the_card_states_the_exceptions, card=True),
        Property(learning.the_run_file_of_the_card_trains, card=True),
        Property(learning.nothing_is_written_outside_the_run_folder),
    )
}
"""Every property by name."""


def excused(case: Case, name: str) -> str | None:
    """The declared reason why a property does not hold on this family, or None."""
    declared = case.method.exceptions
    return declared.get(name, declared.get(f"{name} on {case.family}"))


def check_property(case: Case, name: str) -> None:
    """One cell of the table: the property holds, or it is declared as an exception and does not hold.

    Raises:
        AssertionError: it does not hold, or holds although it is declared as an exception.
        Exception: whatever the method itself raises on the way.
    """
    check, reason = PROPERTIES[name].check, excused(case, name)
    if reason is None:
        check(case)
        return
    # a typed refusal is a way not to hold; any other error is a fault that no declaration covers
    try:
        check(case)
    except (AssertionError, PromptuaryError):
        return
    raise AssertionError(f'it is declared as an exception ("{reason}") but it holds; take it out of `exceptions`')
