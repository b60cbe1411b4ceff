"""The report: tables, figures, one document written as HTML and Markdown, and the model card.

write_report (report), model_card (model_card), quality_table (tables).
"""
