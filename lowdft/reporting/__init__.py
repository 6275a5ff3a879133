"""Tables, charts, the report page and the model card."""
