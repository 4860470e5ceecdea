"""What is said in a recording: its text as symbols, and symbols from the outputs of frames."""
