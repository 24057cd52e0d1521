"""What `npedit prepare` and `npedit caption` share: the models that write, where work is done, what it may cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from npedit.cli.console import err, out
from npedit.cli.judged import read_parameters
from npedit.errors import UserError

if TYPE_CHECKING:
    from npedit.prepare.asking import Meter


WriterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--writer",
        help="The model that looks and writes: the address of an OpenAI-compatible server "
        "(http://localhost:8000/v1; its key in NPEDIT_WRITER_KEY), or the folder or Hub id of a critic family. Give "
        "the option several times for several servers of one model.",
    ),
]
WriterModelOption = Annotated[str, typer.Option("--writer-model", help="The model's name on the server.")]
VerifierOption = Annotated[
    list[str] | None,
    typer.Option(
        "--verifier", help="Another model that verifies (key in NPEDIT_VERIFIER_KEY). If not given: the writer."
    ),
]
VerifierModelOption = Annotated[str, typer.Option("--verifier-model", help="Its name on the server.")]
VerifyOption = Annotated[bool, typer.Option("--verify/--no-verify", help="Check each edit in a further pass.")]
ParametersOption = Annotated[
    str, typer.Option("--writer-parameters", help='JSON that is added to each request: {"temperature": null}.')
]
WorkersOption = Annotated[int, typer.Option(help="Concurrent requests to each server.", min=1, max=1024)]
JpegQualityOption = Annotated[
    int, typer.Option("--jpeg-quality", help="Of the pictures that are sent; 0: PNG.", min=0, max=100)
]
EngineOption = Annotated[
    str, typer.Option("--engine", help="local: this process; ray: a Ray cluster (pip install 'npedit[ray]').")
]
RayAddressOption = Annotated[
    str,
    typer.Option(
        "--ray-address", help="HOST:PORT of the cluster, or auto. If not given: RAY_ADDRESS, or else this machine."
    ),
]
FolderOption = Annotated[Path | None, typer.Option("--out", help="The set's folder. The same command resumes in it.")]
SideOption = Annotated[int, typer.Option(help="Longest side in pixels of the pictures that are sent.", min=16)]
PromptsOption = Annotated[
    Path | None, typer.Option(help="A folder with look.yaml, write.yaml, verify.yaml in place of the package's.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", "-s", help="The same seed and answers give the same set.", min=0, max=2**64 - 1)
]
MaxCostOption = Annotated[float, typer.Option("--max-cost", help="Stop before this cost; needs prices.", min=0)]
PriceInOption = Annotated[float, typer.Option("--price-in", help="Of a million prompt tokens.", min=0)]
PriceOutOption = Annotated[float, typer.Option("--price-out", help="Of a million answer tokens.", min=0)]


def require_options(folder: Path | None, writers: list[str] | None) -> tuple[Path, list[str]]:
    """(folder of the set, writers).

    Raises:
        UserError: one is missing.
    """
    if not folder:
        raise UserError("expected --out SET; got none; give a new folder")
    if not writers:
        raise UserError(
            "expected --writer; got none; give a server's address (http://localhost:8000/v1) with --writer-model, or "
            "the folder or Hub id of a vision-language model"
        )
    return folder, writers


def open_meter(price_in: float, price_out: float, max_cost: float) -> Meter:
    """A new meter of tokens and cost.

    Raises:
        UserError: a ceiling without prices.
    """
    from npedit.prepare.asking import Meter

    if max_cost and not (price_in or price_out):
        raise UserError("--max-cost: expected prices beside it; got none; add --price-in and --price-out")
    return Meter(price_in, price_out, max_cost)


def open_models(
    writers: list[str],
    writer_model: str,
    verifiers: list[str],
    verifier_model: str,
    verify: bool,
    workers: int,
    jpeg_quality: int,
    parameters: str,
) -> tuple[Any, Any]:
    """(writer, verifier or None); the writer verifies too if no other model is given.

    Raises:
        UserError: a model cannot be opened.
    """
    from npedit.prepare.servers import open_writers
    from npedit.prepare.writer import VERIFIER, WRITER

    def on_note(line: str) -> None:
        err.print(f"[yellow]note[/] {escape(line)}")

    extra = read_parameters(parameters, "--writer-parameters")
    first = open_writers(writers, writer_model, WRITER, workers, jpeg_quality, extra, on_note)
    if verifier_model and not verifiers:
        verifiers = writers
    if not verify or not verifiers:
        return first, first if verify else None
    names = WRITER if verifiers == writers else VERIFIER
    return first, open_writers(verifiers, verifier_model, names, workers, jpeg_quality, extra, on_note)


def open_engine(name: str, ray_address: str, models: tuple[Any, Any]) -> Any:
    """The engine with this name; None for the threads of this process.

    Raises:
        UserError: an unknown name, options that do not fit it, or Ray is not installed.
    """
    if name not in ("local", "ray"):
        raise UserError(f"--engine: expected local or ray; got {name!r}; give one of them")
    if name == "local":
        if ray_address:
            raise UserError("--ray-address: expected --engine ray beside it; got none; add it")
        return None
    if not all(model.address for model in models if model):
        raise UserError(
            "--engine ray: expected the address of a server as --writer and --verifier; got a model of this process; "
            "start a server for it, such as vllm serve"
        )
    from npedit.prepare.ray_engine import RayEngine
    from npedit.prepare.writer import VERIFIER_KEY, WRITER_KEY

    writer, verifier = models
    return RayEngine(ray_address, (WRITER_KEY, *([VERIFIER_KEY] if verifier not in (None, writer) else [])))


def print_usage(facts: Mapping[str, Any]) -> None:
    """How many requests were sent, and what all answers took, from the facts in prepare.json."""
    usage, cost = facts["usage"], facts["cost"]
    tokens = f"{usage.get('prompt_tokens', 0):,} prompt tokens, {usage.get('completion_tokens', 0):,} answer tokens"
    priced = f"; cost {cost:.4g}" if cost else ""
    out.print(f"{sum(facts['requests'].values())} requests in this run; of all answers {tokens}{priced}")
