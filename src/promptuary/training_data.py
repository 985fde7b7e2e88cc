"""What a run is fed: encoded rows of each split, the rows of each step, and the parts in which a step runs.

Knows no optimiser, checkpoint or listener. All chance comes from seed, epoch and place: any step can be asked for by
itself, which is what resuming does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from promptuary.data.augment import augmented
from promptuary.data.collate import Row, batches
from promptuary.data.load import Splits
from promptuary.data.splits import SPLITS, naming
from promptuary.errors import ConfigError
from promptuary.features import FOLDER, Features
from promptuary.run import OneTask
from promptuary.seeds import seeded
from promptuary.tuned import Tuned


class Feed:
    """The rows of a run, in the order in which it takes them."""

    def __init__(self, run: OneTask, splits: Splits, tuned: Tuned) -> None:
        """Encode every split; the test rows too: what is wrong with them should be known before training.

        Raises:
            DataError: names the split and the row that is wrong.
            ConfigError: a text, its answer and the prompt exceed the positions of the model.
        """
        self.run, self.tuned, self.examples = run, tuned, splits.train
        self.rows: dict[str, list[Row]] = {}
        for name in SPLITS:
            with naming(name):
                self.rows[name] = tuned.rows(getattr(splits, name), labelled=True)
        self._check_positions()
        self._check_augment()
        self._check_views()
        self._views = list[Tensor]()
        # no answer is among them: a task refuses a template that shows one
        self._varied = sorted(set(tuned.task.template.fields) - {tuned.task.config.image})
        self._epoch, self._order = -1, list[list[int]]()

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass."""
        return math.ceil(len(self.rows["train"]) / self.run.train.batch_size)

    @property
    def steps(self) -> int:
        """Optimiser steps in all."""
        settings = self.run.train
        return settings.steps if settings.epochs is None else max(1, round(settings.epochs * self.steps_per_epoch))

    @property
    def lengths(self) -> list[int]:
        """Tokens of the training texts, in rising order."""
        return sorted(len(row.encoded.ids) for row in self.rows["train"])

    def notes(self) -> list[str]:
        """What a person should know about the texts."""
        cut = {split: sum(row.encoded.cut > 0 for row in rows) for split, rows in self.rows.items()}
        counts = ", ".join(f"{count} {split}" for split, count in cut.items() if count)
        notes = [f"texts cut to data.max_length={self.run.data.max_length}: {counts}"] if counts else []
        limit = self.tuned.offset_rows
        longer = sum(length > limit for length in self.lengths) if limit is not None else 0
        if longer:
            table = f"the offset table of {limit} rows"
            notes.append(f"{longer} training texts are longer than {table}; raise method.max_tokens")
        return notes

    def at(self, step: int) -> list[Row]:
        """The rows of one step, in their order; the same whenever it is asked for."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._epoch != epoch:
            # by the lengths of the texts as they are, so that the order is the same with and without augmentation
            self._order = batches(
                [len(row.encoded.ids) for row in self.rows["train"]],
                self.run.train.batch_size,
                generator=seeded(self.run.seed, 3, epoch),
                bucket=self.run.train.bucket,
            )
            self._epoch = epoch
        return [self.variant(index, epoch) for index in self._order[place]]

    def parts(self, rows: Sequence[Row], largest: int | None = None) -> list[Sequence[Row]]:
        """Rows of one process, cut into as many parts as accumulation asks for, and none larger than `largest`."""
        size = max(1, math.ceil(len(rows) / self.run.train.accumulation))
        size = size if largest is None else min(size, largest)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def weight(self, rows: Sequence[Row]) -> float:
        """What the mean loss of these rows is taken over: examples, or tokens of the answers."""
        if self.tuned.task.reading == "text":
            return float(sum(len(row.target_ids or ()) for row in rows))
        return float(len(rows))

    def variant(self, index: int, epoch: int) -> Row:
        """A training row as this epoch (or step) sees it; only its text and image may differ from the row itself."""
        row, config = self.rows["train"][index], self.run.data.augment
        if config.active:
            row = self._reworded(row, index, epoch)
        if config.varies_images and self._views:
            known = self._views[epoch % len(self._views)][index]
            row = replace(row, encoded=replace(row.encoded, features=known))
        elif config.varies_images:
            row = self._viewed(row, epoch)
        return row

    def _viewed(self, row: Row, view: int) -> Row:
        """A training row with a random view of its image; what is known of the image is not known of its view."""
        place = (self.run.seed, 4, view, row.index)
        image = replace(row.encoded.image, augment=self.run.data.augment, view=place)
        return replace(row, encoded=replace(row.encoded, image=image, features=None))

    def ready(self, check: Callable[[], None]) -> None:
        """Compute what is to be computed once: with `data.views`, what the frozen model makes of the images.

        Args:
            check: called now and then; may raise to stop. What was computed until then is on disk.
        """
        views, config = self.run.data.views, self.run.data
        if not views:
            return
        store = Features(self.tuned.backbone, config.cache or Path(self.run.out) / FOLDER)
        if config.augment.varies_images:
            plain = self.rows["train"]
            self._views = [store.of([self._viewed(row, view) for row in plain], check) for view in range(views)]
        for split, rows in self.rows.items():
            known = store.of(rows, check)
            self.rows[split] = [
                replace(row, encoded=replace(row.encoded, features=own)) for row, own in zip(rows, known, strict=True)
            ]

    def _check_views(self) -> None:
        """Features may be kept only where nothing that is trained has a part in them."""
        if not self.run.data.views:
            return
        tuned, method, baseline = self.tuned, self.tuned.method, self.tuned.baseline
        if tuned.task.config.image is None or tuned.backbone.sight is None:
            raise ConfigError("data.views keeps features of images; set task.image, or leave it out")
        changed = sorted(method.sites & {"layers", "norms"}) if method is not None else []
        if changed or (baseline is not None and not baseline.head_only):
            name = method.name if method is not None else baseline.name if baseline is not None else ""
            what = " and ".join({"layers": "rows among the patches", "norms": "layer norms"}[one] for one in changed)
            raise ConfigError(
                f"data.views keeps what the frozen model makes of an image, but {name} trains {what or 'the model'}, "
                "so that changes in every step; set data.views: 0"
            )
        if self.run.data.views > 1 and not self.run.data.augment.varies_images:
            raise ConfigError("data.views: several views need data.augment.crop or flip; without them there is one")

    def _reworded(self, row: Row, index: int, epoch: int) -> Row:
        config = self.run.data.augment
        generator, example = seeded(self.run.seed, 4, epoch, index), dict(self.examples[index])
        for name in self._varied:
            if isinstance(example[name], str):
                example[name] = augmented(example[name], config, generator)
        pieces = self.tuned.task.fill(example, labelled=True).pieces
        # other words next to each other can make more tokens than the text had
        limit = self.tuned.backbone.max_positions
        room = self.tuned.max_length if limit is None else limit - self.added - self.tuned.answer_positions(row)
        return replace(row, encoded=self.tuned.backbone.encode(pieces, min(room, self.tuned.max_length)))

    def _check_augment(self) -> None:
        config, task = self.run.data.augment, self.tuned.task
        if config.varies_images and task.config.image is None:
            raise ConfigError("data.augment: crop and flip are for images; set task.image, or leave them out")
        if config.active and set(task.template.fields) == {task.config.image}:
            raise ConfigError("data.augment: delete and swap are for texts, and the template shows an image alone")

    def _check_positions(self) -> None:
        limit = self.tuned.backbone.max_positions
        self.added = self.tuned.added_tokens
        sizes = [
            (len(row.encoded.ids), self.tuned.answer_positions(row)) for rows in self.rows.values() for row in rows
        ]
        text, answer = max(sizes, key=sum)
        if limit is not None and text + answer + self.added > limit:
            more = f", the answer ({answer} tokens)" if answer else ""
            room = limit - self.added - answer
            fix = f"lower data.max_length to {room} or shorten the prompt" if room > 0 else "shorten the prompt"
            raise ConfigError(
                f"the longest text ({text} tokens){more} and the prompt ({self.added} rows) exceed the "
                f"model's {limit} positions; {fix}"
            )
