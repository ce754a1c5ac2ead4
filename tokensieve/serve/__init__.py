"""What people and programs talk to: the terminal, the OpenAI-compatible server, and how other engines are started."""
