"""What compiles models for boards or the emulator, and plans what a board can hold and when."""
