"""What a device can do, and the ledger of its memory."""
