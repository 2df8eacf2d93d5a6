"""`fastgpt serve`: a model behind OpenAI's interface, and a page to try it on."""
