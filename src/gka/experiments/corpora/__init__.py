"""A corpus of local text: what is installed on a machine, made into documents that reward a memory, and code.

sources   which packages, with their licences, and their texts
linked    documents of entries that refer to each other
tasks     documents that state facts and ask for them later
build     the documents in two parts, their tokenizer and ids, as a folder or an archive

`python -m gka.experiments.corpora.build` builds one; nothing is downloaded.
"""
