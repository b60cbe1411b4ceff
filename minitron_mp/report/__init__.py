"""Tables, figures, the HTML and Markdown report, and the model card.

write_report (report), model_card (model_card).
"""
