"""Placeholder until the real one lands."""


class Verifier:
    def problem(self):
        return None

    def close(self):
        pass


def start_verifying(config, metas, rank, world_size):
    return Verifier()
