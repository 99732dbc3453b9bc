"""What of the documentation comes out of the program.

    python docs/generate.py                                writes docs/cli.md and the table of names in docs/format.md
    mobe-gguf demo | python docs/generate.py --demo -      puts the demo's output into README.md

``tests/test_docs.py`` fails when the first two are stale.  The demo's output has measured numbers in it: renew it
when the tiny model, the solver or the kernels change.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from mobe_gguf.cli import COMMANDS, main
from mobe_gguf.core import names
from mobe_gguf.models import config_values, families, foreign

ROOT = Path(__file__).resolve().parent.parent
NOTE = "made by docs/generate.py, do not edit"


def outputs() -> dict[Path, str]:
    """Every generated page, by its path, as it should be."""
    page = ROOT / "docs" / "format.md"
    return {
        ROOT / "docs" / "cli.md": cli_page(),
        ROOT / "docs" / "families.md": families_page(),
        page: with_block(page.read_text(encoding="utf-8"), "names", names_table()),
    }


def cli_page() -> str:
    """The command line as Markdown: from the commands' own parameters, so that click's version does not matter."""
    lines = ["# Command line", "", f"<!-- {NOTE} -->", "", *_help(main)]
    lines += ["| command | |", "|---|---|"]
    lines += [f"| [`mobe-gguf {name}`](#mobe-gguf-{name}) | {text} |" for name, text in COMMANDS.items()]
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        arguments = [p for p in command.params if isinstance(p, click.Argument)]
        options = [p for p in command.params if isinstance(p, click.Option)]
        usage = " ".join([f"mobe-gguf {name}", *(a.metavar or a.name.upper() for a in arguments)])
        lines += ["", f"## mobe-gguf {name}", "", f"    {usage}{' [OPTIONS]' * bool(options)}", ""]
        lines += _help(command)
        if options:
            lines += ["| option | |", "|---|---|", *(_option(option) for option in options)]
    return "\n".join(lines) + "\n"


def _help(command: click.Command) -> Iterator[str]:
    """The help text's paragraphs; those that click keeps as they are (``\\b``) become code."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        first, *rest = paragraph.split("\n")
        if first.strip() != "\b":
            yield from (first, *rest, "")
            continue
        indented = [line for line in rest if line.startswith(" ")]
        if indented != rest:
            yield from (rest[0], "")
        yield from (f"    {line.strip()}" for line in indented)
        yield ""


def _option(option: click.Option) -> str:
    value = option.metavar
    if value is None and isinstance(option.type, click.Choice):
        value = " or ".join(option.type.choices)
    elif value is None and not option.is_flag:
        value = "N"
    spelled = ", ".join(option.opts) + "".join(f" / {o}" for o in option.secondary_opts)
    text = option.help or ""
    if option.show_default:
        text += f" [default: {option.default}]"
    if option.required:
        text += " [required]"
    text = " ".join(text.split()).replace("|", "\\|")
    return f"| `{spelled}{f' {value}' if value else ''}` | {text} |"


def names_table() -> str:
    """GGUF keys and tensors, out of ``mobe_gguf/core/names.py`` with its docstrings."""
    lines = ["| key or tensor | |", "|---|---|"]
    for name, function in vars(names).items():
        if not inspect.isfunction(function) or function is names.factor_names:  # three of the others
            continue
        spelled = function("{arch}") if name.startswith("key_") else function("L", "P")
        lines.append(f"| `{spelled}` | {inspect.getdoc(function)} |")
    activations = ", ".join(f"`{name}`" for name in names.ACTIVATIONS)
    lines += [
        "",
        f"Version {names.MOBE_VERSION}: P is {' or '.join(names.PROJECTIONS)}. Version {names.MOBE_VERSION_DOWN}: or down. "
        f"Activations: {activations}.",
    ]
    return "\n".join(lines)


def families_page() -> str:
    """Which models are read how, and what of config.json is refused: out of ``mobe_gguf/models``."""
    lines = ["# Families", "", f"<!-- {NOTE} -->", "", *FAMILIES_TEXT.strip().split("\n"), ""]
    lines += [
        "| family (`model_type`) | Hugging Face | GGUF | moments | factors | why not |",
        "|---|---|---|---|---|---|",
    ]
    for family in families.FAMILIES:
        remote = family.remote
        only = family.model_types[0] in remote
        moments = "as GGUF" if only else "yes" + "".join(f", {t} as GGUF" for t in remote)
        why = f"transformers has no class for {', '.join(remote)}" if remote else ""
        lines.append(
            f"| {', '.join(f'`{t}`' for t in family.model_types)} | yes | yes | {moments} | {', '.join(family.kinds)} | {why} |"
        )
    for model_type, (_, why) in families.OTHERS.items():
        known = model_type not in families.UNCONVERTED | families.OTHERWISE
        row = ["no", "yes", "as GGUF", "gate, up, down"] if known else ["no", "no", "no", "no"]
        if model_type == "nemotron_h":
            row[3] = "up, down"
        if model_type in families.UNCONVERTED:
            why = "llama.cpp's converter does not know it"
        elif known:
            why = f"not written: {why}"
        lines.append(f"| `{model_type}` | {' | '.join(row)} | {why} |")
    lines += ["", "## Quantized weights", "", *FORMS_TEXT.strip().split("\n"), ""]
    lines += ["| `quant_method` | form | instead |", "|---|---|---|"]
    for method, (what, mend) in foreign.METHODS.items():
        instead = "the model in bf16 that it was made of"
        if "mobe-gguf convert" in mend:
            instead = "`mobe-gguf convert`, then the GGUF file"
        lines.append(f"| `{method}` | {what} | {instead} |")
    lines += ["", "## Values of config.json that are refused", "", *REFUSED_TEXT.strip().split("\n"), ""]
    lines += ["| family | key | accepted | the runtime |", "|---|---|---|---|"]
    for name, values in config_values.VALUES.items():
        for key, only in values.only.items():
            accepted = ", ".join(f"`{json.dumps(value)}`" for value in only.allowed)
            lines.append(f"| {name} | `{key}` | {accepted} | {only.computes} |")
        for judge in values.judges:
            if text := inspect.getdoc(judge):
                lines.append(f"| {name} | | | {' '.join(text.split()).replace('|', chr(92) + '|')} |")
    lines += ["", "## Values with a key of this project", "", *OWN_KEYS_TEXT.strip().split("\n")]
    return "\n".join(lines) + "\n"


FAMILIES_TEXT = """
Families with "yes" under Hugging Face are read as directories. All but Bailing and Kimi were compared with
transformers on small random models (`tests/parity`), factorized and not, with one tensor for each expert and
with fused ones, where the family has both. Logits agree to 1e-10 of their energy, those of Qwen3-Next and
Qwen3.5 to 1e-8, because their linear attention is summed in another order. gpt-oss is read in bf16 and in MXFP4;
its published models have YaRN with `truncate: false`, of which llama.cpp computes something close (below).
Of Llama-4, Nemotron-H and models that also see, only files without factors were compared. The code of Bailing
and Kimi is not in transformers and is not run here; their files are compared with files of the same model that have ordinary experts.

Any other MoE goes through a GGUF file: llama.cpp's converter makes it, `mobe-gguf factorize` reads it in any
types, and `export` puts the factors back into it. For these families "yes" under GGUF means that the
converter has a class for them; not each was tried. `mobe-gguf verify FILE --model DIR` compares the first
layers of a file with its model.
"""

FORMS_TEXT = """
FP8 in blocks and MXFP4 are read as they are. Other forms are refused by name, because the factorizer would have to
unpack each of them; where llama.cpp's converter unpacks a form, its GGUF file is a source like any other. So Kimi-K2-Thinking,
whose experts are packed in four bits by compressed-tensors, goes through `mobe-gguf convert`.
"""

REFUSED_TEXT = """
A GGUF file cannot express every value of config.json: for some, llama.cpp's graphs have a constant. If that
would give other answers, `factorize` and `export` refuse the model and name the key, the value and what the
runtime computes. Everything else is carried over. A test changes each key of each family on a small model, or
leaves it out, and compares logits (`tests/export/test_config_values.py`). Lines without a key are rules over several keys.
"""

OWN_KEYS_TEXT = """
For two values this project has its own GGUF keys, which export writes if a model needs them. Only the runtime
of `mobe-gguf build` reads them. Any other llama.cpp ignores them and gives other answers, if it loads the
file at all. Export warns of this.

| key | value | families | without it |
|---|---|---|---|
| `<arch>.norm_topk_prob` | bool: whether routing weights are divided by their sum | qwen3_moe, qwen2_moe, olmoe | qwen3moe does, the others do not |
| `<arch>.expert_group_top_count` | u32: of how many of its best experts the sum ranks a group | deepseek_v2 with `group_limited_greedy`: 1 | 2 |

The first key is not llama.cpp's `expert_weights_norm`, because llama.cpp's model saver writes that as false
also for families whose graph normalizes.
"""


def with_block(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the comments ``name: ...`` and ``end of name`` replaced by ``content``."""
    begin, end = f"<!-- {name}: {NOTE} -->", f"<!-- end of {name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise SystemExit(f"no block {begin} ... {end} to fill")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


def put_demo(output: str) -> None:
    """Put the demo's output into README.md."""
    page = ROOT / "README.md"
    lines = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
    text = with_block(page.read_text(encoding="utf-8"), "demo", f"```\n{lines}\n```")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo", metavar="FILE", help="output of mobe-gguf demo, - for standard input")
    given = parser.parse_args().demo
    if given:
        put_demo(sys.stdin.read() if given == "-" else Path(given).read_text(encoding="utf-8"))
    else:
        for path, text in outputs().items():
            path.write_text(text, encoding="utf-8")
