"""An engine and one of its sequences, for tests that follow a single text."""


class OneSequence:
    """Whatever is not of the sequence is the engine's."""

    def __init__(self, engine):
        self.engine, self.sequence = engine, engine.new_sequence()

    def __getattr__(self, name):
        return getattr(self.engine, name)

    @property
    def length(self):
        return self.sequence.length

    def prefill(self, embeddings):
        return self.engine.prefill(self.sequence, embeddings)

    def decode(self, token_id):
        return self.engine.decode([self.sequence], [int(token_id)])[0]

    def extend(self, token_ids):
        return self.engine.extend(self.sequence, list(token_ids))

    def rewind(self, length):
        self.sequence.rewind(length)
