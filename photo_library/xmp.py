"""Write a verdict's keywords into an XMP document, or remove them again, and leave everything else as it is.

XMP is a subset of RDF/XML (ISO 16684-1, Adobe's XMP specification part 1, section 7). lxml reads and writes the XML.
This file knows the few RDF rules that matter here: a list of keywords may be a Bag, a Seq, an Alt, a single
text or an attribute, in any of several rdf:Description elements, under any prefix.
"""

import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import SequenceMatcher
from typing import TypeAlias

from lxml import etree

from model import MEME, NOT_MEME, NOT_SURE, ROUNDING

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
META = "adobe:ns:meta/"
OURS = "urn:meme-classifier:xmp:1.0#"  # a name, not an address; exiv2 wants it to end in # or /
NAMESPACES = {
    "rdf": RDF,
    "dc": "http://purl.org/dc/elements/1.1/",
    "digiKam": "http://www.digikam.org/ns/1.0/",
    "lr": "http://ns.adobe.com/lightroom/1.0/",
    "memeClassifier": OURS,
}
DESCRIPTION = f"{{{RDF}}}Description"
ABOUT = (f"{{{RDF}}}about", "about")  # the second is how the first RDF specification wrote it
CONTAINERS = tuple(f"{{{RDF}}}{kind}" for kind in ("Bag", "Seq", "Alt"))
ITEM = f"{{{RDF}}}li"
TOOLKIT = f"{{{META}}}xmptk"
CREATOR = "Meme Classifier"  # in x:xmptk of the documents made here

BOMS = (  # UTF-32 first: the mark of UTF-16 is the beginning of its mark
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
    (b"\xef\xbb\xbf", "utf-8"),
)
WHITE_SPACE = tuple(" \t\r\n")
DECLARATION = re.compile(r"\A<\?xml\s[^>]*\?>")
TOKEN = re.compile(
    r"""
    <!--.*?--> | <!\[CDATA\[.*?\]\]> | <\?.*?\?> | </[^>]*> | [^<]+
    | (?P<tag> <(?P<name>[^\s/>]+) (?:[^>"'] | "[^"]*" | '[^']*')*? )
      (?P<end> /> | > (?:</(?P=name)\s*>)? )  # both spellings of an empty element have as many tokens
    """,
    re.DOTALL | re.VERBOSE,
)
DECLARED_ENCODING = re.compile(rb"""\A<\?xml\s[^>]*encoding\s*=\s*["']([^"']*)["']""")

LEAVES = {MEME: "Meme", NOT_MEME: "Not a meme", NOT_SURE: "Not sure"}

Element: TypeAlias = etree._Element


class BadSidecar(ValueError):
    """A sidecar that cannot be used; its text completes the sentence "Its sidecar cat.jpg.xmp …"."""


@dataclass(frozen=True, slots=True)
class KeywordField:
    """A property in which photo libraries keep keywords.

    Attributes:
        prefix: of `NAMESPACES`.
        name: of the property.
        container: the RDF container that its specification asks for.
        separator: between the levels of a hierarchy; None if there are no levels.
    """

    prefix: str
    name: str
    container: str
    separator: str | None

    @property
    def tag(self) -> str:
        """The property's name as lxml spells it."""
        return f"{{{NAMESPACES[self.prefix]}}}{self.name}"

    @property
    def added(self) -> str:
        """Our own property that records the keyword added to this field.

        It is not simply called `subject`: ExifTool shows tags without their namespace unless it is asked for it.
        """
        return f"{{{OURS}}}added{self.name[0].upper()}{self.name[1:]}"

    @property
    def copied(self) -> str:
        """Our own property that records what was copied into this field from the others."""
        return f"{{{OURS}}}copied{self.name[0].upper()}{self.name[1:]}"

    def keyword(self, levels: tuple[str, ...]) -> str:
        """A tag as this field spells it."""
        return self.separator.join(levels) if self.separator else levels[-1]


SUBJECT = KeywordField("dc", "subject", "Bag", None)
TAGS_LIST = KeywordField("digiKam", "TagsList", "Seq", "/")
HIERARCHICAL = KeywordField("lr", "hierarchicalSubject", "Bag", "|")
FIELDS = (SUBJECT, TAGS_LIST, HIERARCHICAL)


@dataclass(frozen=True, slots=True)
class Tag:
    """A verdict for a sidecar.

    Attributes:
        verdict: as in `Prediction`.
        meme_probability: likewise.
        checkpoint: SHA-256 of the checkpoint, in hexadecimal.
        root: the levels of the hierarchy above the verdict's keyword.
        picture: file name of the picture, if the sidecar's own name does not say it.
    """

    verdict: str
    meme_probability: float
    checkpoint: str
    root: tuple[str, ...]
    picture: str | None = None

    @property
    def levels(self) -> tuple[str, ...]:
        """All levels of the hierarchical keyword."""
        return *self.root, LEAVES[self.verdict]


def merge_tag(data: bytes | None, tag: Tag, now: datetime | None = None) -> bytes:
    """Write a verdict into an XMP document, in place of an earlier verdict of ours.

    Args:
        data: the document; None to make a new one.
        tag: the verdict.
        now: the date to record for a verdict that has changed.

    Returns:
        The document; the very same bytes if it says all this already.

    Raises:
        BadSidecar: if the data is not a well-formed XMP document.
    """
    document = XmpDocument.parse(data) if data is not None else XmpDocument.new()
    before = document.state()
    record = document.record()
    same = (
        record.get("memeVerdict") == tag.verdict
        and record.get("checkpointSHA256") == tag.checkpoint
        and _is_close(record.get("memeProbability", ""), tag.meme_probability)
    )
    document.strip()
    document.add(tag, record if same else {}, now or datetime.now(UTC))
    return data if data is not None and document.state() == before else document.serialize()


def remove_tag(data: bytes) -> bytes | None:
    """Remove our verdict from an XMP document.

    Args:
        data: the document.

    Returns:
        The document; the very same bytes if there is no verdict of ours, None if the document was made by
        `merge_tag` and nothing is left in it.

    Raises:
        BadSidecar: if the data is not a well-formed XMP document.
    """
    document = XmpDocument.parse(data)
    if not document.record():
        return data
    document.strip()
    return None if document.is_our_own_and_empty() else document.serialize()


def tagged_picture(data: bytes) -> str | None:
    """The file name of the picture that a document's verdict is about, where `merge_tag` was given one."""
    return XmpDocument.parse(data).record().get("classifiedPicture")


@dataclass(slots=True)
class XmpDocument:
    """An XMP document that is being edited.

    Attributes:
        root: the outermost element.
        rdf: the rdf:RDF element inside.
        prolog: the text before the root element, kept as it is.
        epilog: the text after it, likewise: Adobe's tools leave white space there, to edit a file in place.
        encoding: of the file.
        bom: its byte-order mark, or nothing.
        line_end: what its lines end in; lxml writes line feeds.
        source: the text of the root element as it was read.
        parsed: the same as lxml writes it.
    """

    root: Element
    rdf: Element
    prolog: str
    epilog: str
    encoding: str
    bom: bytes
    line_end: str = "\n"
    source: str = ""
    parsed: str = ""

    @classmethod
    def new(cls) -> "XmpDocument":
        """A document without properties."""
        root = etree.Element(f"{{{META}}}xmpmeta", {TOOLKIT: CREATOR}, {"x": META})
        rdf = etree.SubElement(root, f"{{{RDF}}}RDF", nsmap={"rdf": RDF})
        names = {field.prefix: NAMESPACES[field.prefix] for field in FIELDS}
        etree.SubElement(rdf, DESCRIPTION, {ABOUT[0]: ""}, names)
        etree.indent(root, " ")
        packet = '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        return cls(root, rdf, packet, '\n<?xpacket end="w"?>\n', "utf-8", b"")

    @classmethod
    def parse(cls, data: bytes) -> "XmpDocument":
        """Read a document; BadSidecar if it is not well-formed, declares a DOCTYPE, or holds no XMP."""
        text, encoding, bom = _decode(data)
        try:
            begin = _end_of_prolog(text)
            if text.startswith("<!", begin):  # entities are declared there: bombs, and other files' contents
                raise BadSidecar("declares a DOCTYPE, which XMP does not have, and was left alone")
            root = etree.fromstring(DECLARATION.sub("", text).encode(), _parser())
        except (etree.XMLSyntaxError, ValueError) as error:
            if isinstance(error, BadSidecar):
                raise
            raise BadSidecar("is not well-formed XML and was left alone") from error
        parsed = etree.tostring(root, encoding="unicode", with_tail=False)
        rdf = next(root.iter(f"{{{RDF}}}RDF"), None)
        if rdf is None:
            if etree.QName(root).namespace != META:
                raise BadSidecar("holds no XMP and was left alone")
            rdf = etree.Element(f"{{{RDF}}}RDF", nsmap={"rdf": RDF})
            _append(root, rdf)
        epilog = _start_of_epilog(text)
        line_end = "\r\n" if "\r\n" in text and text.count("\r\n") == text.count("\n") else "\n"
        return cls(root, rdf, text[:begin], text[epilog:], encoding, bom, line_end, text[begin:epilog], parsed)

    def serialize(self) -> bytes:
        """The document as the bytes of a file."""
        changed = etree.tostring(self.root, encoding="unicode", with_tail=False)
        for body in (self._in_source_layout(changed), changed.replace("\n", self.line_end)):
            text = self.prolog + body + self.epilog
            # Never write what nobody could read, or what says something else.
            read = etree.fromstring(DECLARATION.sub("", text).encode(), _parser())
            if etree.tostring(read, encoding="unicode", with_tail=False) == changed:
                break
        return self.bom + text.encode(self.encoding, "xmlcharrefreplace")

    def descriptions(self) -> list[Element]:
        """The elements whose children and attributes are the picture's properties."""
        return [child for child in self.rdf if child.tag == DESCRIPTION]

    def properties(self, tag: str) -> list[Element]:
        """All elements of one property: more than one is not valid XMP, but nothing is to be lost of it."""
        return [child for description in self.descriptions() for child in description if child.tag == tag]

    def values(self, tag: str) -> list[str]:
        """All values of one property, whatever its form."""
        attributes = [text for d in self.descriptions() if isinstance(text := d.get(tag), str)]
        return [*attributes, *(_text(item) for element in self.properties(tag) for item in _items(element))]

    def record(self) -> dict[str, str]:
        """Our own simple properties: what an earlier run wrote; empty if there was none."""
        names = {name for d in self.descriptions() for name in [*d.attrib, *(child.tag for child in d)]}
        ours = [name for name in names if isinstance(name, str) and name.startswith(f"{{{OURS}}}")]
        return {etree.QName(name).localname: ", ".join(self.values(name)) for name in ours}

    def state(self) -> dict[str, list[str]]:
        """Everything that `strip` and `add` may change, to tell whether they have."""
        fields = {field.tag: sorted(self.values(field.tag)) for field in FIELDS}
        copied = {field.copied: sorted(self.values(field.copied)) for field in FIELDS}
        return fields | copied | {name: [text] for name, text in self.record().items() if "copied" not in name}

    def strip(self) -> None:
        """Remove what earlier runs added, by their own record; keywords that the user had before stay."""
        for field in FIELDS:
            for keyword in self.values(field.added):
                self._remove_keyword(field, keyword)
            copied = self.values(field.copied)
            if copied and Counter(copied) == Counter(self.values(field.tag)):  # nobody has used the field since
                for keyword in copied:
                    self._remove_keyword(field, keyword)
        for description in self.descriptions():
            ours = [child for child in description if _is_ours(child.tag)]
            names = [name for name in description.attrib if _is_ours(name)]
            for child in ours:
                _remove(child)
            for name in names:
                del description.attrib[name]
            if (ours or names) and _is_empty(description) and len(self.descriptions()) > 1:
                _remove(description)

    def add(self, tag: Tag, earlier: dict[str, str], now: datetime) -> None:
        """Add a verdict.

        Args:
            tag: the verdict.
            earlier: the record of the same verdict, to keep its date.
            now: its date if there is none.
        """
        if not self.descriptions():
            _append(self.rdf, etree.Element(DESCRIPTION, {ABOUT[0]: ""}))
        first = self.descriptions()[0]
        about = {name: str(first.get(name)) for name in ABOUT if name in first.attrib}
        ours = etree.Element(DESCRIPTION, about, {"memeClassifier": OURS})
        copies = {field: self._keywords_of_other_fields(field) for field in FIELDS}
        for field in FIELDS:
            keyword = field.keyword(tag.levels)
            for copied in copies[field]:
                self._add_keyword(field, copied)
            if keyword not in self.values(field.tag):
                self._add_keyword(field, keyword)
                etree.SubElement(ours, field.added).text = keyword
            if copies[field]:
                bag = etree.SubElement(etree.SubElement(ours, field.copied), CONTAINERS[0], nsmap={"rdf": RDF})
                for copied in copies[field]:
                    etree.SubElement(bag, ITEM).text = copied
        record = {
            "memeVerdict": tag.verdict,
            "memeProbability": earlier.get("memeProbability", f"{tag.meme_probability:.4f}"),
            "checkpointSHA256": tag.checkpoint,
            "classifiedAt": earlier.get("classifiedAt", now.strftime("%Y-%m-%dT%H:%M:%SZ")),
        }
        for name, text in record.items() | ({"classifiedPicture": tag.picture}.items() if tag.picture else set()):
            etree.SubElement(ours, f"{{{OURS}}}{name}").text = text
        ours[:] = sorted(ours, key=lambda child: str(child.tag))
        _append(self.rdf, ours)

    def is_our_own_and_empty(self) -> bool:
        """Whether the document was made here and has no property."""
        made_here = self.root.get(TOOLKIT) == CREATOR and len(self.root) == 1
        return made_here and all(child.tag == DESCRIPTION and _is_empty(child) for child in self.rdf)

    def _in_source_layout(self, changed: str) -> str:
        """The changed document with every unchanged token spelled as in the source.

        lxml spells tags in its own way: quotes, white space between attributes, order of namespaces.
        """
        source, parsed, new = map(_tokens, (self.source, self.parsed, changed))
        if len(source) != len(parsed):
            return changed.replace("\n", self.line_end)
        tokens = list[str]()
        for kind, begin, end, new_begin, new_end in SequenceMatcher(None, parsed, new).get_opcodes():
            if kind == "equal":
                tokens += source[begin:end]
            else:
                tokens += [token.replace("\n", self.line_end) for token in new[new_begin:new_end]]
        return "".join(tokens)

    def _keywords_of_other_fields(self, field: KeywordField) -> list[str]:
        """What a hierarchical field that is about to be created must hold besides our keyword.

        Immich and digiKam read the first of these fields that they find. A new field with nothing but our keyword
        would hide all others from them.
        """
        if field.separator is None or self.values(field.tag):
            return []
        other = HIERARCHICAL if field is TAGS_LIST else TAGS_LIST
        swap = str.maketrans({"|": "/", "/": "|"})  # as Immich and digiKam do where a name holds the other's separator
        paths = list(dict.fromkeys(self.values(other.tag)))
        known = {level for path in paths for level in path.split(other.separator)}
        flat = [keyword for keyword in dict.fromkeys(self.values(SUBJECT.tag)) if keyword not in known]
        return [path.translate(swap) for path in paths] + [
            keyword.replace(field.separator, "/" if field.separator == "|" else "|") for keyword in flat
        ]

    def _add_keyword(self, field: KeywordField, keyword: str) -> None:
        container = self._container(field)
        item = etree.Element(ITEM)
        item.text = keyword
        _append(container, item)

    def _container(self, field: KeywordField) -> Element:
        """The container of a field, made from whatever form the property has now."""
        elements = self.properties(field.tag)
        if not elements:
            holders = [description for description in self.descriptions() if field.tag in description.attrib]
            holder = holders[0] if holders else self.descriptions()[0]
            element = etree.Element(field.tag, nsmap={field.prefix: NAMESPACES[field.prefix]})
            if holders:
                element.text = str(holder.attrib.pop(field.tag))
            _append(holder, element)
            elements = self.properties(field.tag)
        element = elements[0]
        for child in element:
            if child.tag in CONTAINERS:
                return child
        container = etree.Element(f"{{{RDF}}}{field.container}", nsmap={"rdf": RDF})
        if _items(element):  # a single value: it becomes the first item, with all that it has
            item = etree.Element(ITEM)
            for name, value in element.attrib.items():
                item.set(name, value)
            item.text = element.text
            item.extend(list(element))
            _append(container, item)
        element.attrib.clear()
        element[:] = []
        element.text = None
        _append(element, container)
        return container

    def _remove_keyword(self, field: KeywordField, keyword: str) -> None:
        """Remove one keyword from a field, and the property with its last one."""
        for element in reversed(self.properties(field.tag)):
            for item in reversed(_items(element)):
                if _text(item) == keyword:
                    if item is not element:
                        container = item.getparent()
                        _remove(item)
                        if container is not None and len(container):
                            return
                    _remove(element)
                    return
        for description in self.descriptions():
            if description.get(field.tag) == keyword:
                del description.attrib[field.tag]
                return


def _parser() -> etree.XMLParser:
    """A parser that fetches and expands nothing, and keeps white space, comments and CDATA sections."""
    return etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, strip_cdata=False)


def _decode(data: bytes) -> tuple[str, str, bytes]:
    """The text of an XML file without its byte-order mark, its encoding and that mark (XML 1.0, appendix F)."""
    bom, encoding = next(((bom, encoding) for bom, encoding in BOMS if data.startswith(bom)), (b"", ""))
    if not encoding:
        declared = DECLARED_ENCODING.match(data)
        begins = {b"<\0": "utf-16-le", b"\0<": "utf-16-be"}
        encoding = begins.get(data[:2]) or (declared[1].decode("ascii", "replace") if declared else "utf-8")
    try:
        return data[len(bom) :].decode(encoding), encoding, bom
    except (UnicodeError, LookupError) as error:
        raise BadSidecar("is not well-formed XML and was left alone") from error


def _tokens(text: str) -> list[str]:
    """Comments, CDATA sections, processing instructions, tags and texts; a start tag is split before its end."""
    found = TOKEN.finditer(text)
    return [part for match in found for part in ((match["tag"], match["end"]) if match["tag"] else (match[0],))]


def _end_of_prolog(text: str) -> int:
    """Where the XML declaration, processing instructions and comments before the root element end."""
    at = 0
    while True:
        while text[at : at + 1] in WHITE_SPACE:
            at += 1
        if text.startswith("<?", at):
            at = text.index("?>", at) + 2
        elif text.startswith("<!--", at):
            at = text.index("-->", at) + 3
        else:
            return at


def _start_of_epilog(text: str) -> int:
    """Where the root element of a well-formed document ends."""
    begin = len(text)
    while True:
        while text[begin - 1] in WHITE_SPACE:
            begin -= 1
        if text.endswith("?>", 0, begin):
            begin = text.rindex("<?", 0, begin)
        elif text.endswith("-->", 0, begin):
            begin = text.rindex("<!--", 0, begin)
        else:
            return begin


def _is_close(recorded: str, probability: float) -> bool:
    """Whether a recorded probability is the same but for the rounding of processors and batches."""
    try:
        return abs(float(recorded) - probability) < ROUNDING
    except ValueError:
        return False


def _is_ours(name: object) -> bool:
    """Whether an element's or attribute's name is in our namespace; comments have a function for a name."""
    return isinstance(name, str) and name.startswith(f"{{{OURS}}}")


def _is_empty(description: Element) -> bool:
    """Whether it has no property; what it is about is none."""
    return len(description) == 0 and all(name in ABOUT for name in description.attrib)


def _items(element: Element) -> list[Element]:
    """The elements that hold a property's values: its container's items, or itself if it is a single value."""
    for child in element:
        if child.tag in CONTAINERS:
            return [item for item in child if isinstance(item.tag, str)]
    has_value = len(element) or element.attrib or (element.text or "").strip()
    return [element] if has_value else []


def _text(item: Element) -> str:
    return "".join(str(text) for text in item.itertext()).strip()


def _indentation(element: Element) -> str | None:
    """The white space before an element if it stands in a line of its own, else None."""
    previous, parent = element.getprevious(), element.getparent()
    before = previous.tail if previous is not None else parent.text if parent is not None else "\n"
    return "\n" + before.rpartition("\n")[2] if before and "\n" in before and not before.strip() else None


def _append(parent: Element, child: Element) -> None:
    """Add a child as the last one, indented like the document, so that removing it restores the text."""
    siblings = list(parent)
    outer = _indentation(parent)
    inner = _indentation(siblings[0]) if siblings else outer and outer + " "
    parent.append(child)
    if outer is None or inner is None:
        return
    etree.indent(child, inner[-1], level=len(inner) - 1)
    if siblings:
        child.tail, siblings[-1].tail = siblings[-1].tail, inner
    else:
        parent.text, child.tail = inner, outer


def _remove(element: Element) -> None:
    """Remove an element with the white space around it; text that is more than that stays."""
    parent, previous = element.getparent(), element.getprevious()
    if parent is None:
        return
    before = (previous.tail if previous is not None else parent.text) or ""
    after = element.tail or ""
    indentation = after if element.getnext() is None else before
    kept = before + after if before.strip() or after.strip() else indentation
    parent.remove(element)
    if previous is not None:
        previous.tail = kept
    else:
        parent.text = kept if len(parent) or kept.strip() else None
