"""The models of `npedit prepare`, and where its work is done: options and opening."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from npedit.cli.judged import read_parameters
from npedit.errors import UserError

err = Console(stderr=True, highlight=False, soft_wrap=True)

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

    extra = read_parameters(parameters)
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
        raise UserError(f"--engine: expected local or ray; got {name!r}")
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
