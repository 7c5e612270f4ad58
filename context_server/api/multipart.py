"""Takes the one file out of a ``multipart/form-data`` body (RFC 7578), piece by piece as it arrives."""

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from context_server.errors import InvalidRequest, Violation


def boundary_of(content_type: str) -> bytes:
    """What stands between the parts.

    Raises:
        InvalidRequest: the header does not say.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise InvalidRequest(Violation("header.Content-Type", "must name the boundary of the parts"))
    return boundary


class FilePart:
    """The one part of a body: feed it, and it gives what of the file has come.

    ``name`` and ``media_type`` are what its headers say; they are None as long as those have not come.
    """

    def __init__(self, boundary: bytes) -> None:
        self.name: str | None = None
        self.media_type: str | None = None
        self._header = bytearray()
        self._value = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._pieces: list[bytes] = []
        self._parts = 0
        self._is_complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise _malformed() from None

    def feed(self, data: bytes) -> bytes:
        """What of the file is in the next bytes of the body.

        Raises:
            InvalidRequest: it is no such body, or holds anything but one file.
        """
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)

    def close(self) -> None:
        """Says that the body is at its end.

        Raises:
            InvalidRequest: the parts are not.
        """
        if not self._is_complete or self.name is None:
            raise _malformed()

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > 1:
            raise InvalidRequest(Violation("body", "must have one part, which is the file"))

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"filename" not in options:
            raise InvalidRequest(Violation("body", "must have one part, which is the file and has a filename"))
        self.name = options[b"filename"].decode(errors="replace")
        self.media_type = self._headers.get(b"content-type", b"").decode("latin-1")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._pieces.append(data[start:end])

    def _on_end(self) -> None:
        self._is_complete = True


def _malformed() -> InvalidRequest:
    return InvalidRequest(Violation("body", "is not multipart/form-data as its Content-Type says"))
