"""Checked with readers that know nothing of this project: ExifTool, Exiv2 and canonical XML."""

import json
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from lxml import etree

from model import ROUNDING
from photo_library.xmp import FIELDS, BadSidecar, Tag, XmpDocument, merge_tag, remove_tag

SIDECARS = Path(__file__).parent / "sidecars"
PROGRAMS = ("digikam", "darktable", "lightroom")
SHA256 = "0123456789abcdef" * 4
MEME = Tag("meme", 0.97312, SHA256, ("Meme Classifier",))
NOT_MEME = Tag("not_meme", 0.02, SHA256, ("Meme Classifier",))
MONDAY = datetime(2026, 11, 23, 8, 30, tzinfo=UTC)
TUESDAY = datetime(2026, 11, 24, 8, 30, tzinfo=UTC)
OUR_KEYWORDS = {
    "XMP-dc:Subject": "Meme",
    "XMP-digiKam:TagsList": "Meme Classifier/Meme",
    "XMP-lr:HierarchicalSubject": "Meme Classifier|Meme",
}


def wrap(properties: str, attributes: str = "") -> bytes:
    """An XMP document around the XML of some properties."""
    return f"""<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:dc="http://purl.org/dc/elements/1.1/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" {attributes}>{properties}</rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
""".encode()


def keywords(data: bytes) -> dict[str, list[str]]:
    document = XmpDocument.parse(data)
    return {field.name: document.values(field.tag) for field in FIELDS}


def exiftool(*paths: Path) -> list[dict[str, Any]]:
    """All that ExifTool reads of each file, by group and name; structures stay whole."""
    if not shutil.which("exiftool"):
        pytest.skip("exiftool is not installed (Debian: libimage-exiftool-perl)")
    command = ["exiftool", "-json", "-struct", "-G1", "-a", *map(str, paths)]
    files = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return [{name: value for name, value in file.items() if name.startswith("XMP-")} for file in files]


def exiv2(path: Path) -> set[tuple[str, str]]:
    """All that Exiv2 reads of a file: key and value."""
    if not shutil.which("exiv2"):
        pytest.skip("exiv2 is not installed")
    done = subprocess.run(["exiv2", "-PXkv", str(path)], check=True, capture_output=True, text=True)
    return {(key, value.strip()) for key, _, value in (line.partition(" ") for line in done.stdout.splitlines())}


@pytest.fixture(params=PROGRAMS)
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A sidecar as another program writes it."""
    return Path(shutil.copy(SIDECARS / f"{request.param}.xmp", tmp_path))


def test_a_new_sidecar_says_it_all(tmp_path: Path) -> None:
    path = tmp_path / "cat.jpg.xmp"
    path.write_bytes(merge_tag(None, MEME, MONDAY))
    (found,) = exiftool(path)
    assert {name: [keyword] for name, keyword in OUR_KEYWORDS.items()}.items() <= found.items()
    assert found["XMP-memeClassifier:MemeVerdict"] == "meme"
    assert found["XMP-memeClassifier:MemeProbability"] == 0.9731
    assert found["XMP-memeClassifier:CheckpointSHA256"] == SHA256
    assert found["XMP-memeClassifier:ClassifiedAt"] == "2026:11:23 08:30:00Z"
    read = exiv2(path)
    assert {
        ("Xmp.dc.subject", "Meme"),
        ("Xmp.digiKam.TagsList", "Meme Classifier/Meme"),
        ("Xmp.lr.hierarchicalSubject", "Meme Classifier|Meme"),
        ("Xmp.memeClassifier.memeProbability", "0.9731"),
    } <= read


def test_our_tags_hide_no_others_where_programs_leave_out_the_namespace() -> None:
    """Immich's ExifTool shows `TagsList` and `Date` whatever their namespace."""
    root = etree.fromstring(merge_tag(None, MEME))
    ours = {etree.QName(e).localname.lower() for e in root.iter("{urn:meme-classifier:xmp:1.0#}*")}
    assert ours
    assert not ours & {"subject", "tagslist", "hierarchicalsubject", "date", "keywords", "rating", "label", "title"}


def test_a_merge_loses_nothing(foreign: Path) -> None:
    merged = foreign.with_name("merged.xmp")
    merged.write_bytes(merge_tag(foreign.read_bytes(), MEME))
    before, after = exiftool(foreign, merged)
    read_before, read_after = exiv2(foreign), exiv2(merged)
    for name, value in before.items():
        assert after[name] == ([*value, OUR_KEYWORDS[name]] if name in OUR_KEYWORDS else value)
    for name, keyword in OUR_KEYWORDS.items():
        assert keyword in after[name]
    changed = {key for key, _ in read_before - read_after}
    assert changed <= {"Xmp.dc.subject", "Xmp.digiKam.TagsList", "Xmp.lr.hierarchicalSubject"}
    assert {name.partition(":")[0] for name in after.keys() - before.keys()} <= {"XMP-memeClassifier", "XMP-digiKam"}


def test_a_second_merge_changes_no_byte_and_removal_restores_the_document(foreign: Path) -> None:
    original = foreign.read_bytes()
    merged = merge_tag(original, MEME, MONDAY)
    assert merge_tag(merged, MEME, TUESDAY) == merged
    removed = remove_tag(merged)
    assert removed is not None
    assert removed == original


# What an XML library would spell in another way: quotes, order and lines of attributes, references, empty elements.
LAYOUT = """<x:xmpmeta xmlns:x='adobe:ns:meta/'  x:xmptk = "Any > 1" >
<r:RDF xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <r:Description r:about=''
      xmlns:foo="urn:foo" foo:b="&#49; &lt;2/>" xmlns:d='http://purl.org/dc/elements/1.1/' foo:a = 'say "hi"'
      >
    <foo:empty></foo:empty><foo:also  /> <!-- <d:subject> -->
    <foo:text>&quot;a&quot; &gt; b<![CDATA[<&>]]> &#233;\u00e9</foo:text><?foo <bar> ?>
    KEYWORDS
  </r:Description >
  <r:Description r:about='' xmlns:xmp='http://ns.adobe.com/xap/1.0/'
     xmp:Rating='4'/>
</r:RDF>
</x:xmpmeta >"""
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n{}\n' + (" " * 99 + "\n") * 20 + "<?xpacket end='w'?>"
)


@pytest.mark.parametrize(
    "subject",
    [
        "",
        "<d:subject><r:Bag><r:li>cat</r:li></r:Bag></d:subject>",
        "<d:subject >\n     <r:Seq\n >\n       <r:li>cat</r:li>\n  <r:li >dog</r:li>\n     </r:Seq>\n    </d:subject>",
    ],
)
@pytest.mark.parametrize("wrapping", ["{}", PACKET])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_byte_that_is_not_ours_stays(subject: str, wrapping: str, line_end: str, encoding: str) -> None:
    text = wrapping.format(LAYOUT.replace("KEYWORDS", subject))
    original = text.replace("\n", line_end).encode(encoding)
    merged = merge_tag(original, MEME, MONDAY)
    assert merge_tag(merged, MEME, TUESDAY) == merged
    assert merge_tag(merged, NOT_MEME, TUESDAY) == merge_tag(original, NOT_MEME, TUESDAY)
    assert remove_tag(merged) == original
    left = iter(merged.decode(encoding).replace(line_end, "\n"))  # all of the text is there, in its order
    assert all(letter in left for letter in text)


def test_mixed_line_ends_stay() -> None:
    original = LAYOUT.replace("KEYWORDS", "").encode().replace(b"\n", b"\r\n", 3)
    assert remove_tag(merge_tag(original, MEME)) == original


def test_another_verdict_replaces_ours_alone(foreign: Path) -> None:
    original = foreign.read_bytes()
    changed = merge_tag(merge_tag(original, MEME, MONDAY), NOT_MEME, TUESDAY)
    assert changed == merge_tag(original, NOT_MEME, TUESDAY)
    assert not [text for texts in keywords(changed).values() for text in texts if text.endswith("Meme")]


def test_another_root_replaces_the_earlier_one() -> None:
    other = Tag("meme", 0.97312, SHA256, ("Sorted", "Fun"))
    changed = merge_tag(merge_tag(None, MEME), other)
    assert keywords(changed) == {
        "subject": ["Meme"],
        "TagsList": ["Sorted/Fun/Meme"],
        "hierarchicalSubject": ["Sorted|Fun|Meme"],
    }


def test_the_date_is_that_of_the_verdict() -> None:
    first = merge_tag(None, MEME, MONDAY)
    moved = Tag("meme", MEME.meme_probability - ROUNDING / 2, SHA256, MEME.root)
    assert merge_tag(first, moved, TUESDAY) == first  # other batches round otherwise; that is no news
    for news in (
        Tag("meme", MEME.meme_probability - 2 * ROUNDING, SHA256, MEME.root),
        Tag("meme", MEME.meme_probability, "f" * 64, MEME.root),
    ):
        record = XmpDocument.parse(merge_tag(first, news, TUESDAY)).record()
        assert record["classifiedAt"] == "2026-11-24T08:30:00Z"
        assert record["memeProbability"] == f"{news.meme_probability:.4f}"


def test_a_sidecar_that_only_we_wrote_in_goes_with_the_tag() -> None:
    made = merge_tag(None, MEME)
    assert remove_tag(made) is None
    rated = made.replace(b'rdf:about="">', b'rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmp:Rating="3">', 1)
    kept = remove_tag(rated)
    assert kept is not None
    assert b'xmp:Rating="3"' in kept
    assert b"Meme Classifier|" not in kept


# Properties as elements, as attributes, and the keywords in them.
FORMS = [
    ("<dc:subject><rdf:Bag><rdf:li>a</rdf:li></rdf:Bag></dc:subject>", "", ["a"]),
    ("<dc:subject><rdf:Seq><rdf:li>a</rdf:li><rdf:li>b</rdf:li></rdf:Seq></dc:subject>", "", ["a", "b"]),
    ('<dc:subject><rdf:Alt><rdf:li xml:lang="en">a</rdf:li></rdf:Alt></dc:subject>', "", ["a"]),
    ("<dc:subject>a</dc:subject>", "", ["a"]),
    ("", 'dc:subject="a"', ["a"]),
    ('<dc:subject rdf:parseType="Resource"><rdf:value>a</rdf:value></dc:subject>', "", ["a"]),
    ("<dc:subject/>", "", []),
    ("<dc:subject><rdf:Bag/></dc:subject>", "", []),
    ("<dc:subject><rdf:Bag>\n<!-- mine -->\n<rdf:li>a</rdf:li></rdf:Bag></dc:subject>", "", ["a"]),
    (
        "<Q:subject xmlns:Q='http://purl.org/dc/elements/1.1/'><rdf:Seq><rdf:li>a</rdf:li></rdf:Seq></Q:subject>",
        "",
        ["a"],
    ),
    ("<subject xmlns='http://purl.org/dc/elements/1.1/'>a</subject>", "", ["a"]),
    ("</rdf:Description><rdf:Description rdf:about='' dc:subject='a'>", "", ["a"]),
    ("", "xmlns:lr='https://example.org/other' lr:hierarchicalSubject='other'", []),
]


@pytest.mark.parametrize(("properties", "attributes", "subjects"), FORMS)
def test_keywords_of_every_form_stay(properties: str, attributes: str, subjects: list[str]) -> None:
    original = wrap(properties, attributes)
    merged = merge_tag(original, MEME)
    assert keywords(merged)["subject"] == [*subjects, "Meme"]
    assert merge_tag(merged, MEME) is merged
    removed = remove_tag(merged)
    assert removed is not None
    assert keywords(removed) == keywords(original)


def test_other_programs_read_keywords_of_every_form(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.xmp" for number in range(len(FORMS))]
    for path, (properties, attributes, _) in zip(paths, FORMS, strict=True):
        path.write_bytes(merge_tag(wrap(properties, attributes), MEME))
    for path, found, (properties, _, subjects) in zip(paths, exiftool(*paths), FORMS, strict=True):
        if "xmlns='http" not in properties:  # exiftool 12 knows no default namespace
            assert found["XMP-dc:Subject"] == [*subjects, "Meme"]
        read = {word for key, value in exiv2(path) if key.startswith("Xmp.dc.subject") for word in value.split(", ")}
        assert {*subjects, "Meme"} <= read


def test_a_single_keyword_keeps_what_it_says_about_itself() -> None:
    merged = merge_tag(wrap('<dc:subject rdf:resource="https://example.org/a"/>'), MEME)
    assert b'<rdf:li rdf:resource="https://example.org/a"/>' in merged
    assert merged.count(b"rdf:resource") == 1


def test_a_keyword_that_the_user_had_stays_when_ours_goes() -> None:
    original = wrap("<dc:subject><rdf:Bag><rdf:li>Meme</rdf:li><rdf:li>Not a meme</rdf:li></rdf:Bag></dc:subject>")
    merged = merge_tag(original, MEME)
    assert keywords(merged)["subject"] == ["Meme", "Not a meme"]
    changed = merge_tag(merged, NOT_MEME)
    assert keywords(changed)["subject"] == ["Meme", "Not a meme"]
    for data in (merged, changed):
        removed = remove_tag(data)
        assert removed is not None
        assert keywords(removed) == keywords(original)


def test_fields_that_libraries_read_first_hide_no_keywords_of_the_others() -> None:
    """Immich and digiKam read the first of the fields that they find, and that alone."""
    original = (SIDECARS / "lightroom.xmp").read_bytes()
    merged = merge_tag(original, MEME)
    assert keywords(merged)["TagsList"] == ["Places/Beach", "summer", "Meme Classifier/Meme"]
    # Lightroom gives it another keyword; the copy follows.
    more = merged.replace(b"<rdf:li>Places|Beach</rdf:li>", b"<rdf:li>Places|Beach</rdf:li><rdf:li>Cats</rdf:li>", 1)
    assert keywords(merge_tag(more, MEME))["TagsList"] == ["Places/Beach", "Cats", "summer", "Meme Classifier/Meme"]
    # digiKam gives it one, in its own field: from now on, that field is the user's.
    own = merged.replace(b"<rdf:li>Places/Beach</rdf:li>", b"<rdf:li>Places/Beach</rdf:li><rdf:li>Mine</rdf:li>", 1)
    removed = remove_tag(merge_tag(own, NOT_MEME))
    assert removed is not None
    assert keywords(removed)["TagsList"] == ["Places/Beach", "Mine", "summer"]


def test_several_descriptions_keep_their_subject_and_their_keywords(tmp_path: Path) -> None:
    about = "uuid:faf5bdd5-ba3d-11da-ad31-d33d75182f1b"
    original = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="{about}" xmlns:xmp="http://ns.adobe.com/xap/1.0/"><xmp:Rating>2</xmp:Rating>
  </rdf:Description>
  <rdf:Description rdf:about="{about}" xmlns:dc="http://purl.org/dc/elements/1.1/" dc:subject="beach"/>
</rdf:RDF></x:xmpmeta>""".encode()
    merged = merge_tag(original, MEME)
    assert {e.get(f"{{{e.nsmap['rdf']}}}about") for e in etree.fromstring(merged)[0]} == {about}
    path = tmp_path / "a.xmp"
    path.write_bytes(merged)
    (found,) = exiftool(path)
    assert (found["XMP-xmp:Rating"], found["XMP-dc:Subject"]) == (2, ["beach", "Meme"])
    assert ("Xmp.xmp.Rating", "2") in exiv2(path)


def test_unusual_documents_are_written_as_others_read_them(tmp_path: Path) -> None:
    names = 'xmlns:x="adobe:ns:meta/" xmlns:r="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
    originals = [
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"/>',
        f"<x:xapmeta {names}><r:RDF/></x:xapmeta>",
        f'<x:xmpmeta {names}><r:RDF><r:Description about=""/></r:RDF></x:xmpmeta>',
        f'<x:xmpmeta {names} xmlns:dc="https://example.org/other"><r:RDF>'
        '<r:Description r:about="" dc:subject="other"/></r:RDF></x:xmpmeta>',
    ]
    paths = [tmp_path / f"{number}.xmp" for number in range(len(originals))]
    for path, original in zip(paths, originals, strict=True):
        path.write_bytes(merge_tag(original.encode(), MEME))
        removed = remove_tag(path.read_bytes())
        assert removed is not None
        assert "Meme Classifier" not in removed.decode()
        assert ("https://example.org/other" in removed.decode()) == ("https://example.org/other" in original)
    for found in exiftool(*paths):
        assert OUR_KEYWORDS.keys() <= found.keys()


@pytest.mark.parametrize("root", ["RDF", "r:RDF"])
def test_rdf_may_be_outermost(root: str) -> None:
    """As ISO 16684-1 allows; exiftool 12 and exiv2 0.27 do not recognise such files."""
    declared = root.replace("RDF", "").replace("r:", ":r").strip()
    original = f'<{root} xmlns{declared}="http://www.w3.org/1999/02/22-rdf-syntax-ns#"/>'.encode()
    merged = merge_tag(original, MEME)
    assert keywords(merged)["TagsList"] == ["Meme Classifier/Meme"]
    about = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}about"
    assert [child.get(about) for child in etree.fromstring(merged)] == ["", ""]


@pytest.mark.parametrize(
    ("encoding", "bom"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-16-le", b""),
        ("utf-32-be", b"\x00\x00\xfe\xff"),
        ("iso-8859-1", b""),
    ],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_encodings_marks_and_line_ends_stay(encoding: str, bom: bytes, line_end: str) -> None:
    name = "utf-16" if "16" in encoding else "utf-32" if "32" in encoding else encoding
    text = f'<?xml version="1.0" encoding="{name}"?>\n' + wrap("<dc:subject>Zoë</dc:subject>").decode()
    original = bom + text.replace("\n", line_end).encode(encoding)
    merged = merge_tag(original, Tag("meme", 0.9, SHA256, ("Спам",)))
    assert merged.startswith(bom)
    after = merged[len(bom) :].decode(encoding)
    assert after.startswith(f'<?xml version="1.0" encoding="{name}"?>{line_end}<x:xmpmeta')
    assert after.count("\n") == after.count(line_end)
    assert keywords(merged) == {
        "subject": ["Zoë", "Meme"],
        "TagsList": ["Zoë", "Спам/Meme"],
        "hierarchicalSubject": ["Zoë", "Спам|Meme"],
    }


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "not well-formed"),
        (b"no XML", "not well-formed"),
        (wrap("<dc:title>"), "not well-formed"),
        (wrap("") + b"more", "not well-formed"),
        (b"\n<?xml version='1.0'?>" + wrap(""), "not well-formed"),
        (b"<?xml version='1.0'" + wrap(""), "not well-formed"),
        (wrap("")[:-20], "not well-formed"),
        (wrap("<dc:title>&mine;</dc:title>"), "not well-formed"),
        (b"\xff\xfe" + wrap(""), "not well-formed"),
        (b"<?xml version='1.0' encoding='no such'?>" + wrap(""), "not well-formed"),
        (b"<?xml version='1.0' encoding='base64'?>" + wrap(""), "not well-formed"),
        (wrap("<dc:title>\x00</dc:title>"), "not well-formed"),
        (wrap("<dc:title>caf\u00e9</dc:title>").decode().encode("iso-8859-1"), "not well-formed"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "holds no XMP"),
        (b"<!DOCTYPE x>" + wrap(""), "DOCTYPE"),
        (b"<?xml version='1.0'?>\n<!-- a -->\n<!DOCTYPE x [<!ENTITY a 'b'>]>" + wrap("&a;"), "DOCTYPE"),
        (b"<!DOCTYPE x SYSTEM 'file:///etc/passwd'>" + wrap(""), "DOCTYPE"),
        (wrap("<dc:a>" * 100_000 + "</dc:a>" * 100_000), "not well-formed"),
    ],
)
def test_what_is_no_xmp_is_refused_in_a_sentence(data: bytes, sentence: str) -> None:
    for change in (lambda: merge_tag(data, MEME), lambda: remove_tag(data)):
        with pytest.raises(BadSidecar, match=sentence):
            change()


def test_an_entity_bomb_is_not_expanded() -> None:
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE x [<!ENTITY e0 "boom">{entities}]>'.encode() + wrap("<dc:title>&e11;</dc:title>")
    with pytest.raises(BadSidecar, match="DOCTYPE"):
        merge_tag(bomb, MEME)


def test_comments_around_the_document_stay() -> None:
    original = b"<?xml version='1.0'?>\n\n<!-- before -->\n" + wrap("") + b"\n<!-- after <?x ?> -->\n  <?end <!-- ?>\n"
    merged = merge_tag(original, MEME)
    assert merged.startswith(b"<?xml version='1.0'?>\n\n<!-- before -->\n<x:xmpmeta")
    assert merged.endswith(b"</x:xmpmeta>\n\n<!-- after <?x ?> -->\n  <?end <!-- ?>\n")


@pytest.mark.parametrize("program", ["exiftool", "exiv2"])
def test_round_trips_through_other_programs_keep_our_tags(program: str, foreign: Path) -> None:
    """They write the whole file anew: other prefixes, attributes instead of elements, one rdf:Description."""
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    original = keywords(foreign.read_bytes())
    foreign.write_bytes(merge_tag(foreign.read_bytes(), MEME, MONDAY))
    command = {
        "exiftool": ["exiftool", "-q", "-overwrite_original", "-XMP-dc:Title=By another program"],
        "exiv2": ["exiv2", "-M", "set Xmp.dc.title By another program"],
    }[program]
    subprocess.run([*command, str(foreign)], check=True, capture_output=True)
    written = foreign.read_bytes()
    assert merge_tag(written, MEME, TUESDAY) == written
    changed = merge_tag(written, NOT_MEME, TUESDAY)
    assert [text for texts in keywords(changed).values() for text in texts if text.endswith("Meme")] == []
    removed = remove_tag(changed)
    assert removed is not None
    assert {name: sorted(texts) for name, texts in keywords(removed).items()} == {
        name: sorted(texts) for name, texts in original.items()
    }
    assert b"By another program" in removed
    assert b"urn:meme-classifier" not in etree.tostring(etree.fromstring(removed), method="c14n", exclusive=True)
