"""Prompts: from a file, a folder or the hub to checked texts and chats."""
