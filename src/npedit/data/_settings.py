"""The settings that all sources of photos share."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from npedit.data._metadata import FieldName
from npedit.questions import normalise_edit_type
from npedit.recipe.config import Settings as Base

Pixels = Annotated[int, Field(ge=8, le=8192)]


class PhotoSettings(Base):
    """Where the photos are and how they are cropped. `sizes` are (H, W) in pixels; each batch has one size."""

    path: str
    sizes: tuple[tuple[Pixels, Pixels], ...] = Field(
        ((512, 512), (576, 448), (448, 576), (640, 384), (384, 640), (512, 384), (384, 512)), min_length=1
    )
    max_bad_share: float = Field(0.05, ge=0, le=1, description="share of bad rows above which training stops")
    share: float = Field(1.0, gt=0, le=1, description="share of the rows that is used, drawn at random")
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        {}, description="edit type -> its share of an epoch; the other types divide the rest by their numbers of rows"
    )
    held_out: Annotated[int, Field(ge=0)] | str = Field(
        0, description="rows that are never trained on, for samples and judge: how many, or a file of their ids"
    )
    other_photos: bool = Field(
        True, description="of scene rows: other photos of the subject are for the critic, not for the student"
    )
    nothing_share: float = Field(0.01, ge=0, le=1, description="share of items turned into 'do nothing'")
    columns: dict[FieldName, str] = Field({}, description="our field name -> the data set's column name")
    max_pixels: int = Field(80_000_000, ge=1, le=89_478_485, description="larger images are bad rows")
    min_kept_share: float = Field(
        0.25, ge=0, le=1, description="share of a photo that its crop must keep; longer and narrower ones are bad rows"
    )
    max_enlargement: float = Field(
        4.0, gt=0, description="how many times a photo's sides may be enlarged; smaller ones are bad rows"
    )
    prefetch: int = Field(2, ge=0, le=16, description="batches prepared in advance, each in a separate thread")

    @field_validator("shares")
    @classmethod
    def _check_shares(cls, shares: dict[str, float]) -> dict[str, float]:
        """The shares by our names of the edit types.

        Raises:
            ValueError: an unknown type, one that comes twice, or shares that add up to more than 1.
        """
        known = {normalise_edit_type(name): share for name, share in shares.items()}
        if len(known) < len(shares):
            raise ValueError(f"expected each edit type once; got {', '.join(shares)}")
        total = sum(known.values())
        if total > 1 + 1e-9:
            raise ValueError(f"expected shares that add up to at most 1; got {total:g}")
        return known
