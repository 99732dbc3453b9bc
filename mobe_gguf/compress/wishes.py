"""What is asked of a compression: by options, or by an entry of ``mobe-gguf plan --json``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobe_gguf.core.errors import MobeError, UsageError
from mobe_gguf.core.files import sha256
from mobe_gguf.core.names import PROJECTIONS
from mobe_gguf.core.records import record
from mobe_gguf.plan.forms import Given

#: Names of the plain and the factorized candidate, and the values of ``--form``.
PLAIN, MOBE = "plain", "mobe"
FORMS = ("auto", PLAIN, MOBE)
#: Wishes that may change when a job is resumed: where work is done, and what is made of the finished file.
FREE = ("memory", "device", "ray", "threads", "verify", "split_max_size")


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the result should be, and how it is made.

    - ``size``: of the file in bytes; if None, ``quant`` decides.
    - ``bases``, ``rank``, ``target`` (share of the parameters), ``activation``, ``basis_type``, ``transform_type``: of the
      factorized form, chosen automatically if None.  ``groups``, ``mix``, ``mix_terms``, ``layers``, ``projections``,
      ``steps``, ``seed``: as in :class:`~mobe_gguf.factorize.spec.Options`.
    - ``text``: for calibration; ``eval_text``: for measurements; the shipped texts if None.
    - ``moments``: a file of an earlier ``mobe-gguf moments``, instead of gathering them; ``keep``: the share of their
      energy that is kept; ``gradients``: weigh experts' inputs by the loss's gradients, too.
    - ``down_type``, ``output_type``, ``embedding_type``, ``overrides``: types in all files made here, as in
      :class:`~mobe_gguf.quant.recipe.Recipe`; so is ``pure``.
    - ``refit``, ``rest_from``, ``tokenizer_pre``, ``experts_used``, ``base_model``, ``card``: as in
      :class:`~mobe_gguf.export.request.ExportOptions`.
    - ``sequential``: round each layer's experts for what the rounded layers before put out (``export.sequential``).
    - ``split_max_size``: bytes of tensors in one file of the result.
    - ``placement``: llama.cpp's options that say where weights go, for measurements.  ``ray``: address of a cluster for
      the fit.
    """

    size: int | None = None
    form: str = "auto"
    quant: str | None = None
    text: tuple[Path, ...] = ()
    eval_text: Path | None = None
    ctx: int = 512
    chunks: int | None = None
    eval_chunks: int | None = 64
    bases: int | None = None
    rank: int | None = None
    activation: str | None = None
    steps: int | None = None
    target: float | None = None
    groups: int | None = None
    mix: str | None = None
    mix_terms: int | None = None
    layers: tuple[int, ...] | None = None
    projections: tuple[str, ...] | None = None
    seed: int | None = None
    basis_type: str | None = None
    transform_type: str | None = None
    moments: Path | None = None
    keep: float | None = None
    gradients: bool = False
    down_type: str | None = None
    output_type: str | None = None
    embedding_type: str | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    sequential: bool = True
    refit: bool = True
    rest_from: Path | None = None
    tokenizer_pre: str | None = None
    experts_used: int | None = None
    base_model: str | None = None
    card: bool = True
    split_max_size: int | None = None
    memory: int | None = None
    device: str = "cpu"
    ray: str | None = None
    threads: int | None = None
    placement: tuple[str, ...] = ()
    rivals: bool = True
    measure: bool = True
    verify: bool = True

    def check(self) -> None:
        """UsageError if the wishes do not say what to make."""
        if self.form not in FORMS:
            raise UsageError(f"--form {self.form}: expected one of {', '.join(FORMS)}")
        if self.size is None and self.quant is None:
            raise UsageError(
                "say how large the file may be: --size 80G or --bpw 2.5 (or --quant q3_k, or --plan FILE); mobe-gguf plan MODEL lists what "
                "fits"
            )
        if self.target is not None and self.bases is not None:
            raise UsageError(
                "--target chooses the number of bases of each layer; leave out --bases or --target"
            )
        if self.rest_from is not None and self.form != MOBE:
            raise UsageError("--rest-from gives what is no factor, so it is for --form mobe")

    def given(self) -> Given:
        """What of the factorized form is given."""
        return Given(
            bases=self.bases,
            rank=self.rank,
            kept=self.target,
            basis_type=self.basis_type,
            transform_type=self.transform_type,
            quant=self.quant,
            groups=self.groups or 1,
            by_row=self.mix == "row",
            projections=self.projections or PROJECTIONS,
            layers=self.layers,
        )

    def description(self) -> dict[str, Any]:
        """What must be the same when a job is resumed, as JSON values; texts by their content."""
        made = dataclasses.asdict(self) | {"text": [sha256(path) for path in self.text]}
        made["eval_text"] = self.eval_text and sha256(self.eval_text)
        made["moments"] = self.moments and sha256(self.moments)
        made["rest_from"] = self.rest_from and sha256(self.rest_from)
        return {k: v for k, v in made.items() if k not in FREE}


@dataclass(frozen=True)
class FormOptions:
    """How to make a form of a plan: values of the options with the same names."""

    form: str
    quant: str
    bases: int | None = None
    rank: int | None = None
    basis_type: str | None = None
    transform_type: str | None = None


@dataclass(frozen=True)
class PlannedForm:
    name: str
    make: FormOptions
    meets_wishes: bool


@dataclass(frozen=True)
class PlanFile:
    """The part of ``mobe-gguf plan --json`` that is needed here."""

    model: str
    parameters: int
    forms: tuple[PlannedForm, ...]


def by_plan(path: Path, parameters: int, form: str | None = None) -> dict[str, Any]:
    """Wishes from the best form of a plan that fits, or from the form named ``form``; the model has ``parameters``
    parameters.

    MobeError if ``path`` holds no plan, or one of another model.  UsageError if no form fits, or none has the name.
    """
    try:
        plan = record(PlanFile, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise MobeError(
            f"--plan {path}: cannot be read ({e}); expected what this writes:\n  mobe-gguf plan MODEL --json > {path}"
        ) from e
    if plan.parameters != parameters:
        raise MobeError(
            f"--plan {path}: it is of {plan.model} with {plan.parameters} parameters, MODEL has {parameters}. Plan anew:\n  "
            f"mobe-gguf plan MODEL --json > {path}"
        )
    if form is not None:
        found = next((p for p in plan.forms if p.name == form), None)
        if found is None:
            raise UsageError(
                f"--plan-form {form}: the plan has {', '.join(p.name for p in plan.forms)}; give one of these"
            )
    else:
        found = next((p for p in plan.forms if p.meets_wishes), None)
        if found is None:
            raise UsageError(
                f"--plan {path}: nothing in it fits the machine that it is for; choose one by --plan-form, for instance "
                f"{plan.forms[0].name if plan.forms else 'q2_k'}"
            )
    return dataclasses.asdict(found.make)
