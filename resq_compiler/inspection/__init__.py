"""What the compiler did to a model: dumps of every pass, a page to browse them, differences, and diagnostics.

dump_files.py     names of a dump's files, writing and reading them
dump.py           numbered text, JSON and Graphviz files of every stage; never weights, always in the same order
page.py           index.html: one self-contained page over a dump
diff.py           what differs between two dumps
topology_view.py  residual stream, blocks, attention and feed-forward as a tree
noise.py          signal to noise of every quantizer and weight
noise_table.py    the same as a table, by place
activations.py    ranges, outliers, spectra and space utilization at every site, before and after
attribution.py    which sites cost the accuracy
plots.py          pictures of the last three
"""
