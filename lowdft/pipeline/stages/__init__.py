"""One file per stage; a stage never imports another stage."""
