"""What people and programs talk to: `api` has OpenAI's routes and `server` runs them, `page` is for browsers and `terminal` for terminals,
`deploy` starts other engines.
"""
