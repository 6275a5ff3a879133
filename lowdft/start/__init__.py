"""The verbs for getting started: check this machine (`doctor`), and write a first recipe (`init`)."""
