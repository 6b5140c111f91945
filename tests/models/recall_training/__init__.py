"""Parts of train_recall.py: text, vocabularies, tasks, network, files."""
