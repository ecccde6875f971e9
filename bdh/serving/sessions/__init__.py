"""Sessions: conversations whose state the server keeps."""
