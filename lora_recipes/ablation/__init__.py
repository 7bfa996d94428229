"""Many runs, one report: arms and seeds, workers, clusters, figures.

How one run trains is in training/.
"""
