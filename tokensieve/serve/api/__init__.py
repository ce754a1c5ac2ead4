"""OpenAI's routes, and those for monitoring. Each file has a router, whose routes use the application's state."""
