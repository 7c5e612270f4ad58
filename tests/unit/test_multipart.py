"""The one file of a multipart body, however its bytes are cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_server.api.multipart import FilePart, boundary_of
from context_server.errors import InvalidRequest

BOUNDARY = b"----edge"


def form(*parts: tuple[str, bytes]) -> bytes:
    """A body of parts, each with its headers and its content."""
    body = b"".join(b"--" + BOUNDARY + b"\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n" for head, data in parts)
    return body + b"--" + BOUNDARY + b"--\r\n"


FILE = 'Content-Disposition: form-data; name="file"; filename="naïve.txt"\r\nContent-Type: text/plain'


def taken(body: bytes, cuts: list[int]) -> tuple[FilePart, bytes]:
    part = FilePart(BOUNDARY)
    ends = [*sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    found = b"".join(part.feed(body[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    part.close()
    return part, found


@given(data=st.binary(max_size=300), cuts=st.lists(st.integers(min_value=0), max_size=8))
def test_the_file_is_the_same_wherever_the_body_is_cut(data: bytes, cuts: list[int]) -> None:
    part, found = taken(form((FILE, data)), cuts)
    assert (part.name, part.media_type, found) == ("naïve.txt", "text/plain", data)


def test_what_looks_like_the_end_is_data() -> None:
    data = b"\r\n--" + BOUNDARY[:-1] + b"\r\n--\r\n"
    assert taken(form((FILE, data)), list(range(200)))[1] == data


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"rubbish",
        b"--" + BOUNDARY + b"--\r\n",
        form((FILE, b"a"))[:-8],
        form((FILE, b"a"), (FILE, b"b")),
        form(('Content-Disposition: form-data; name="note"', b"a"), (FILE, b"b")),
        form(('Content-Disposition: form-data; name="note"', b"a")),
        form(("Content-Type: text/plain", b"a")),
        form((FILE + "\r\nX-Long: " + "x" * 100_000, b"a")),
        form((FILE + "\r\n" + "\r\n".join(f"X-{number}: 1" for number in range(1000)), b"a")),
    ],
)
def test_anything_but_one_file_is_refused(body: bytes) -> None:
    part = FilePart(BOUNDARY)
    with pytest.raises(InvalidRequest):  # noqa: PT012  # Some are refused at once, others at the end.
        part.feed(body)
        part.close()


@pytest.mark.parametrize(
    "header", ["multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; x=y"]
)
def test_the_boundary_has_to_be_named(header: str) -> None:
    with pytest.raises(InvalidRequest):
        boundary_of(header)


def test_a_boundary_may_be_quoted_and_is_bounded() -> None:
    assert boundary_of('multipart/form-data; boundary="a b"') == b"a b"
    with pytest.raises(InvalidRequest):
        FilePart(b"x" * 1000)
