"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

ModelOption = Annotated[
    str, typer.Option("--model", "--run", "-m", help="A run, its final/ folder, or 'embedded': the one that ships.")
]
SeedOption = Annotated[int, typer.Option("--seed", "-s", help="The same seed gives the same result.", min=0)]
StepsOption = Annotated[int | None, typer.Option(help="Steps of the editor; as trained if not given.", min=1, max=64)]
