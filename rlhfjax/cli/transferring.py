"""Models in and out: `rlhfjax import` and `rlhfjax export`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rlhfjax import stores
from rlhfjax.cli.checking import NoVerify
from rlhfjax.cli.datasets import directory
from rlhfjax.cli.launching import among_processes
from rlhfjax.config.upkeep import Reliability
from rlhfjax.errors import ConfigError, IntegrityError
from rlhfjax.integrity import unverified
from rlhfjax.terminal import printable, say


def import_(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A Hugging Face directory, a .gguf file, or smollm2.")],
    target: Annotated[
        Path, typer.Argument(metavar="DST", parser=directory, help="The checkpoint directory that is made.")
    ],
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="How it is stored: float32 or bfloat16.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that was imported before.")] = False,
) -> None:
    """Make a checkpoint of a published model. Weights come from safetensors or GGUF; no code of a model is ever run.

    \b
    Example:
      rlhfjax import smollm2 models/smollm2
    """
    from rlhfjax import transfer

    found = str(stores.here(source)) if stores.is_url(source) else source
    with among_processes(Reliability(), None, None, None), _delivered(target, force) as place:
        transfer.import_model(found, place, dtype=dtype, force=force, report=say)


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A checkpoint, a stage's directory, or a run's (its last policy).")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="DST", parser=directory, help="The directory that is made, or a file NAME.gguf.")
    ],
    item: Annotated[
        str | None, typer.Option(metavar="ITEM", help="policy, average, value or reward.  [default: what it serves]")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="TYPE", help="float32, bfloat16 or float16.")] = "float32",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The largest file of weights.")] = "5GB",
    quantize: Annotated[
        str | None, typer.Option(metavar="TYPE", help="Of a .gguf file: f32, f16 or q8_0.  [default: f32]")
    ] = None,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Write a policy's adapters alone, as PEFT does, in float32.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that is there.")] = False,
    no_verify: NoVerify = False,
) -> None:
    """Write a model as a Hugging Face directory, with a model card and proof that it computes the same.

    Adapters are merged into their base, or with --adapters written alone. No model is read whole, and processes of
    `launch local` share the work. A DST that ends in .gguf is one file for llama.cpp, with tokenizer and template.

    \b
    Examples:
      rlhfjax export runs/quickstart exported/policy --dtype bfloat16
      rlhfjax export runs/quickstart exported/policy.gguf --quantize q8_0
    """
    as_gguf = target.suffix == ".gguf"
    if (as_gguf or adapters) and (dtype, shard_size) != ("float32", "5GB"):
        what, own = ("a .gguf file", "; --quantize says its type") if as_gguf else ("--adapters", " in float32")
        raise ConfigError(f"{what}: it is one file{own}; remove --dtype and --shard-size")
    if quantize and not as_gguf:
        raise ConfigError(f"--quantize: expected DST to end in .gguf, got {target}; a directory has --dtype")
    if as_gguf:
        if adapters:
            raise ConfigError(
                "--adapters: expected a directory, got a .gguf file; adapters go into a .gguf file merged"
            )
        _export_gguf(checkpoint, target, item, quantize or "f32", force, no_verify)
        return
    if adapters:
        with unverified(no_verify):
            _export_adapters(checkpoint, target, item, force)
        return
    from rlhfjax import transfer

    settings = {"item": item, "dtype": dtype, "shard_size": transfer.parse_size(shard_size), "force": force}
    together = among_processes(Reliability(), None, None, None)
    with together, unverified(no_verify), _delivered(target, force) as place:
        parity = transfer.export_checkpoint(checkpoint, place, **settings)
    [difference] = (value for key, value in parity.items() if key.endswith("_difference"))
    say(f"wrote {stores.address(target)} (read back, it differs by at most {difference:.2g})")


def _export_gguf(checkpoint: str, target: Path, item: str | None, quantize: str, force: bool, no_verify: bool) -> None:
    from rlhfjax import transfer

    stores.require_local(target, "DST")
    with unverified(no_verify):
        parity = transfer.export_gguf(checkpoint, target, item=item, quantize=quantize, force=force)
    say(f"wrote {target} (read back, it differs by at most {parity['max_abs_logit_difference']:.2g})")


def verify_export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", parser=directory, help="A directory that `rlhfjax export` wrote.")
    ],
) -> None:
    """Compare an export with its certificate: every tensor, index, tokenizer, chat template, generation config.

    `verify.py` in the export does the same without rlhfjax. Exit code 4 names what differs.

    \b
    Example:
      rlhfjax verify-export exported/policy
    """
    from rlhfjax.interop.verify_export import CERTIFICATE, check

    try:
        bad, said = check(stores.here(directory))
    except OSError as error:
        reason = f"{directory}: expected an export with {CERTIFICATE}, got {error.strerror}"
        raise ConfigError(f"{reason}; `rlhfjax verify` looks at checkpoints and data") from None
    for line in bad:
        typer.echo(printable(f"{directory}/{line}"))
    if bad:
        raise IntegrityError(f"{directory}: {len(bad)} differences from what was exported, named above; fetch it again")
    say(f"{directory}: {said}")


@contextmanager
def _delivered(target: Path, force: bool) -> Iterator[Path]:
    """`stores.delivered`, where one process makes the directory; several need one that all of them see."""
    from rlhfjax.host import processes

    if processes.count() > 1:
        stores.require_local(target, "DST of several processes")
    with stores.delivered(target, force) as place:
        yield place


def _export_adapters(checkpoint: str, target: Path, item: str | None, force: bool) -> None:
    from rlhfjax.interop.peft import export_adapters
    from rlhfjax.training.checkpoint import find_checkpoint, load_model

    with stores.delivered(target, force) as place:
        export_adapters(place, *load_model(find_checkpoint(checkpoint), item=item), force=force)
    say(f"wrote {stores.address(target)} (adapters alone; their base is a model of its own)")
