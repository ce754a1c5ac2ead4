"""The text of a PDF: bytes on standard input, JSON on standard output.

`uploads` runs this file in a process of its own, because a PDF is a program written by a stranger. If one unfolds to
gigabytes, or keeps its reader busy for hours, only this process ends. It imports nothing from tokensieve, so it starts
at once.
"""

import io
import json
import resource
import sys
from typing import Any

MAX_MEMORY = 768 * 2**20  # bytes
MAX_SECONDS = 20  # of processor time
MAX_PAGES = 5000
MAX_CHARACTERS = 4_000_000  # more than a million tokens


def confine() -> None:
    """Limit this process to so much memory and time, and let it write nothing to a disk."""
    for limit, value in (
        (resource.RLIMIT_AS, MAX_MEMORY),
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def read(data: bytes) -> dict[str, Any]:
    """{"text", "pages"}, or {"error"}: why there is no text, in words for the sender of the PDF."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, LimitReachedError, PyPdfError

    try:
        reader = PdfReader(io.BytesIO(data))
        pages = len(reader.pages)
        if pages > MAX_PAGES:
            return {"error": f"the PDF has {pages} pages and may have {MAX_PAGES}; send a part of it"}
        texts, length = [], 0
        for page in reader.pages:
            texts.append(page.extract_text())
            length += len(texts[-1])
            if length > MAX_CHARACTERS:
                return {"error": f"the PDF holds more than {MAX_CHARACTERS} characters of text; send a part of it"}
    except (FileNotDecryptedError, DependencyError):
        return {"error": "the PDF is encrypted; save it without a password"}
    except (MemoryError, LimitReachedError):
        return {"error": "the PDF unfolds to more than is read here; send its text"}
    except (
        PyPdfError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        return {"error": f"the PDF is damaged ({type(error).__name__}); save it anew, or send its text"}
    text = "\n\n".join(text.strip() for text in texts)
    # half a surrogate pair is no text, and cannot be sent
    text = text.encode(errors="replace").decode()
    if not text.strip():
        return {"error": "the PDF holds no text, only pictures of it; send it as text"}
    return {"text": text, "pages": pages}


def main() -> None:
    confine()
    json.dump(read(sys.stdin.buffer.read()), sys.stdout)


if __name__ == "__main__":
    main()
