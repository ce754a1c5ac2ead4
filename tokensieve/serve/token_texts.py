"""Single tokens as text and as bytes. A token may be a part of a character, which has bytes but no text."""

from typing import Any


class TokenTexts:
    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Byte-level BPE writes each byte as a letter: printable bytes as themselves, the others in order from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self._bytes = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._special = {id for id, token in added.items() if token.special}
        self._byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)

    def bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        letters = self._tokenizer.convert_ids_to_tokens(token)
        if letters and self._byte_level and all(letter in self._bytes for letter in letters):
            return bytes(self._bytes[letter] for letter in letters)
        return self._tokenizer.decode([token]).encode()

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """The token's text, or its bytes in OpenAI's notation if they are no text, so that names are unique."""
        data = self.bytes_of(token)
        text = data.decode(errors="replace")
        return text if text.encode() == data else "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def visible_bytes(self, token: int) -> bytes:
        """The token's part of an answer's text: empty for a special token."""
        return b"" if token in self._special else self.bytes_of(token)
