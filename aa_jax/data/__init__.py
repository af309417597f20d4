"""From files to batches: sources -> templates -> tokens with exact spans -> collate -> loader.

Nothing here imports a model or a loss; importing this package loads nothing heavy.
"""
