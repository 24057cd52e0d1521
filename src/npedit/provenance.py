"""The metadata of an edited picture: that an AI model edited it, which one, and on request with which instruction.

The metadata are an XMP packet with properties of the IPTC Photo Metadata Standard 2025.1. Programs that re-encode a
picture, and most web sites, remove such metadata.
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from npedit import __version__
from npedit.errors import UserError, did_you_mean
from npedit.runs.resolve import EditorSource

CHOICES = ("editor", "instruction", "none")
MOST_CHARACTERS = 8000  # of an instruction in the metadata: a JPEG file holds at most 65,533 bytes of XMP
EDITED_BY_AI = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
{properties}
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""


def require_choice(choice: str) -> None:
    """Check the value of `--provenance`.

    Raises:
        UserError: it is not one of `CHOICES`.
    """
    if choice not in CHOICES:
        hint = did_you_mean(choice, CHOICES)
        raise UserError(f"--provenance: expected one of {', '.join(CHOICES)}; got {choice!r}.{hint} Give one of them")


def provenance_packet(choice: str, model: str, source: EditorSource, instruction: str) -> bytes:
    """The XMP packet for a picture that the editor `model` edited, as `choice` (one of `CHOICES`) asks; b"" for
    "none"."""
    if choice == "none":
        return b""
    return xmp_packet(editor_name(model, source), instruction if choice == "instruction" else "")


def editor_name(model: str, source: EditorSource) -> str:
    """The name of the editor `model` without its place on this computer: that of its run's folder, or of its own folder
    if it has no run. `source` is what `resolve_editor` found."""
    if model == "embedded":
        return "npedit embedded toy editor"
    run = (source.run or source.folder).resolve().name
    return f"{run}/{source.folder.name}" if source.is_checkpoint else run


def xmp_packet(editor: str, instruction: str = "") -> bytes:
    """An XMP packet that says that this editor made the picture from a photo and AI output; "" leaves the instruction
    out."""
    properties = {
        "Iptc4xmpExt:DigitalSourceType": EDITED_BY_AI,
        "Iptc4xmpExt:AISystemUsed": editor,
        "xmp:CreatorTool": f"npedit {__version__}",
    }
    if instruction:
        properties["Iptc4xmpExt:AIPromptInformation"] = instruction[:MOST_CHARACTERS]
    lines = [f"   <{name}>{escape(_without_controls(value))}</{name}>" for name, value in properties.items()]
    return PACKET.format(properties="\n".join(lines)).encode("utf-8")


def _without_controls(text: str) -> str:
    """The text without the characters that XML cannot hold, such as control characters."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")
