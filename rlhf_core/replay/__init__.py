"""An iteration computed again: compared bit by bit, asked what if, and packed to be sent."""
