"""The report: one document written as HTML and Markdown, and the model card.

report                                    write_report
project                                   Project: the protocol that a report reads
importance_section, training_section,
search_section, provenance_section        sections of the report
rounds                                    the rounds of a run, and the section that compares them
correction_gain                           effect of teacher correction
tables                                    quality_table and other tables of results
figures                                   plots
document                                  tables, figures and text as HTML or Markdown
model_card                                model_card
"""
