"""What people and programs talk to: `api` has OpenAI's routes and `server` runs them, `terminal` talks, `deploy` starts other engines."""
