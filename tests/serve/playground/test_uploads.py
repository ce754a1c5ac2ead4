"""`POST /documents`: the text of a PDF, and the damage that a PDF must not do."""

import asyncio
import io
import resource
import socket
import subprocess
import sys
import time
import zlib
from contextlib import ExitStack
from pathlib import Path

import httpx2 as httpx
import pytest
from pypdf import PdfReader, PdfWriter

from tests.support import servers
from tokensieve.engine import EngineConfig
from tokensieve.serve.errors import ApiError
from tokensieve.serve.playground import pdf, uploads

HELLO = b"BT /F1 12 Tf 72 700 Td (The code is 482913.) Tj ET"


def made(*contents: bytes) -> bytes:
    """A PDF with a page for each of these streams of drawing commands."""
    bodies = [b"<< /Type /Catalog /Pages 2 0 R >>", b"", b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"]
    pages = []
    for content in contents:
        packed = zlib.compress(content, 9)
        bodies.append(b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(packed), packed))
        kind = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 R >> >>"
        bodies.append(kind + b" /Contents %d 0 R >>" % len(bodies))
        pages.append(b"%d 0 R" % len(bodies))
    bodies[1] = b"<< /Type /Pages /Count %d /Kids [%s] >>" % (len(pages), b" ".join(pages))
    out, places = io.BytesIO(), []
    out.write(b"%PDF-1.4\n")
    for number, body in enumerate(bodies, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, body))
    begin = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(bodies) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(bodies) + 1, begin))
    return out.getvalue()


def encrypted(password: str) -> bytes:
    writer, out = PdfWriter(), io.BytesIO()
    writer.append(PdfReader(io.BytesIO(made(HELLO))))
    writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(out)
    return out.getvalue()


@pytest.fixture(scope="module")
def at():
    with servers.running(servers.tiny(), EngineConfig(pages=8, running=1), max_body=100_000) as (address, _):
        yield address


def send(at: str, data: bytes, kind: str = "application/pdf") -> httpx.Response:
    return httpx.post(at + "/documents", content=data, headers={"Content-Type": kind}, timeout=60)


def test_its_text(at: str) -> None:
    answer = send(at, made(HELLO, b"", HELLO.replace(b"482913", b"70358")))
    assert answer.json() == {"text": "The code is 482913.\n\n\n\nThe code is 70358.", "pages": 3}
    assert send(at, encrypted(""), "Application/PDF; x=y").json()["text"] == "The code is 482913."


REFUSED = {
    "no PDF": (b"hello" * 50, "damaged"),
    "nothing": (b"", "damaged"),
    "cut": (made(HELLO)[:200], "damaged"),
    "pictures": (made(b"0 0 m 10 10 l S"), "no text"),
    "locked": (encrypted("secret"), "encrypted"),
}


@pytest.mark.parametrize(("data", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(at: str, data: bytes, words: str) -> None:
    answer = send(at, data)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"] and error["type"] == "invalid_request_error" and "\n" not in error["message"]


def test_other_refusals(at: str, monkeypatch) -> None:
    assert send(at, made(HELLO), "text/plain").status_code == 400
    assert send(at, bytes(100_001)).status_code == 413
    assert httpx.get(at + "/documents").status_code == 405
    monkeypatch.setattr(uploads, "MAX_READING", 0)
    monkeypatch.setattr(uploads, "MAX_WAITING", 0)
    assert send(at, made(HELLO)).status_code == 429
    monkeypatch.undo()
    monkeypatch.setattr(uploads.importlib.util, "find_spec", lambda name: None)
    missing = send(at, made(HELLO))
    assert missing.status_code == 501 and "pip install 'tokensieve[serve]'" in missing.json()["error"]["message"]


def test_stalled_uploads_keep_no_places(at: str) -> None:
    host, port = at.removeprefix("http://").split(":")
    head = b"POST /documents HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/pdf\r\n"
    head += b"Content-Length: 90000\r\n\r\n%PDF"
    with ExitStack() as stack:
        for _ in range(uploads.MAX_READING + uploads.MAX_WAITING):
            stack.enter_context(socket.create_connection((host, int(port)))).sendall(head)
        assert send(at, made(HELLO)).json()["pages"] == 1


def reads_with(limits: str, data: bytes) -> subprocess.CompletedProcess[bytes]:
    """A document, read as the server reads it but with other limits."""
    code = f"import sys; sys.path.append({str(Path(pdf.__file__).parent)!r}); import pdf; {limits}; pdf.main()"
    return subprocess.run([sys.executable, "-P", "-c", code], input=data, capture_output=True, timeout=60)


def test_limits() -> None:
    """A PDF that unfolds to a hundred times its size, and one that takes endless work, are given up soon."""
    bomb = made(b"BT /F1 12 Tf " + b"(a) Tj " * 2_000_000 + b"ET")
    assert len(bomb) < 100_000
    assert b"unfolds" in reads_with("pdf.MAX_MEMORY = 120 * 2**20", bomb).stdout
    assert reads_with("pdf.MAX_SECONDS = 1", bomb).returncode < 0
    assert b"has 3 pages" in reads_with("pdf.MAX_PAGES = 2", made(HELLO, HELLO, HELLO)).stdout
    assert b"more than 9 characters" in reads_with("pdf.MAX_CHARACTERS = 9", made(HELLO)).stdout


def test_it_cannot_write(tmp_path: Path) -> None:
    target = tmp_path / "file"
    code = f"import sys; sys.path.append({str(Path(pdf.__file__).parent)!r}); import pdf; pdf.confine(); "
    writes = f"open({str(target)!r}, 'w').write('x')"
    subprocess.run([sys.executable, "-P", "-c", code + writes], capture_output=True, timeout=60)
    assert not target.exists() or not target.read_bytes()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 0  # of this process, which reads `pdf` for its path only


def test_a_reader_that_hangs_is_ended(monkeypatch, tmp_path: Path) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(uploads.pdf, "__file__", str(sleeper))
    monkeypatch.setattr(uploads, "MAX_SECONDS", 0.5)
    begin = time.monotonic()
    with pytest.raises(ApiError, match="too long"):
        asyncio.run(uploads.text_of(b""))
    assert time.monotonic() - begin < 20
