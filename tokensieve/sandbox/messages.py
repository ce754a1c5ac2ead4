"""The messages between a caller and the supervisor of its program: a request one way, a report back.

Standard library only, and little of it, since every program waits for it: to import `typing`, `enum`, `signal`, `re` or
`platform` takes longer than the namespaces.
"""

WORD = 8  # bytes of a length


class Request:
    """A program to run. Paths are absolute, limits are in the units of their names.

    `binds` are paths of the host that are at the same place inside, to read only; `hidden` are folders below them that
    are empty inside; `links` is target, path, target, path, and so on; `files` are (name in the work folder, content).
    """

    def __init__(
        self,
        limits: list[int],  # in the order of the attributes below
        command: list[str],
        stdin: bytes,
        binds: list[str],
        links: list[str],
        hidden: list[str],
        files: list[tuple[str, bytes]],
    ) -> None:
        self.limits = limits
        self.wall_ms, self.cpu_ms, self.memory_bytes, self.disk_bytes, self.processes, self.output_bytes = limits
        self.command, self.stdin, self.files = command, stdin, files
        self.binds, self.links, self.hidden = binds, links, hidden


class Report:
    """The end of a program, or, if `ended` is "refused" or "invalid", the reason why it was not started, in `err`."""

    def __init__(self, ended: str, status: int = 0, micros: int = 0, out: bytes = b"", err: bytes = b"") -> None:
        self.ended, self.status, self.micros, self.out, self.err = ended, status, micros, out, err


def join(fields: list[bytes]) -> bytes:
    return b"".join(len(field).to_bytes(WORD, "big") + field for field in fields)


def split(data: bytes) -> list[bytes]:
    """The fields that `join` joined. ValueError if the last one is cut off."""
    fields, place = [], 0
    while place < len(data):
        end = place + WORD + int.from_bytes(data[place : place + WORD], "big")
        if end > len(data) or place + WORD > len(data):
            raise ValueError("a message was cut off")
        fields.append(data[place + WORD : end])
        place = end
    return fields


def _encode(texts: list[str]) -> bytes:
    return join([text.encode("utf-8", "surrogateescape") for text in texts])


def _decode(data: bytes) -> list[str]:
    return [field.decode("utf-8", "surrogateescape") for field in split(data)]


def encode_request(request: Request) -> bytes:
    files = [part for name, content in request.files for part in (name.encode("utf-8", "surrogateescape"), content)]
    numbers = " ".join(map(str, request.limits)).encode()
    lists = map(_encode, (request.command, request.binds, request.links, request.hidden))
    return join([numbers, request.stdin, *lists, *files])


def decode_request(data: bytes) -> Request:
    numbers, stdin, *rest = split(data)
    command, binds, links, hidden = map(_decode, rest[:4])
    names = [name.decode("utf-8", "surrogateescape") for name in rest[4::2]]
    files = list(zip(names, rest[5::2]))
    return Request([int(number) for number in numbers.split()], command, stdin, binds, links, hidden, files)


def encode_report(report: Report) -> bytes:
    return join([f"{report.ended} {report.status} {report.micros}".encode(), report.out, report.err])


def decode_report(data: bytes) -> Report | None:
    """None if the supervisor died before its report was complete."""
    try:
        head, out, err = split(data)
        ended, status, micros = head.split()
        return Report(ended.decode(), int(status), int(micros), out, err)
    except ValueError:
        return None
