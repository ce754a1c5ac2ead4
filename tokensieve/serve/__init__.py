"""The engine behind HTTP: OpenAI's routes, and a playground beside them.

A request passes `gate` (host, key, log line) and `body` (time, size, gzip), a route in `api` and its `schema`, then
`handler`. The handler lets a format (`chat_format`, `completion_format`) make the prompt, hands the engine its
requests, and gives the outputs to the `response` builder, which `streaming` sends. `app` assembles all of this, and
`server` runs it.

`playground` holds what is not OpenAI's: the page, text from PDFs, the attention trace and the mirror. The API does not
need it.
"""
