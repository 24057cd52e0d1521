"""How good an edit is: metrics, critic scores, results folders, intervals and paired tests."""
