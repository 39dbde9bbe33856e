# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Text
#
# Count how often each document has each word, and the table is like any other here. Components are
# then topics: words that go together, and how much of each topic a document has. Every share comes
# with its uncertainty, which matters where documents are short.

# %%
import os

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.utils.discovery import all_estimators

import pnmf_pyro
from pnmf_pyro import plotting, transforms

small = bool(os.environ.get("PNMF_SMALL"))  # fewer documents and topics, for continuous integration

# %% [markdown]
# ## The documents
#
# A corpus that every reader of this page has: the help texts of the classes of scikit-learn. Each
# is a document of some hundred words. The module that a class is in, such as `cluster`, is a label
# that the fit does not see.
#
# Words of three letters and less are left out, and so are those in more than 30% of the documents.
# They belong to no topic. Words in fewer than four documents tell too little.

# %%
classes = pd.Series(dict(all_estimators()))[:: 3 if small else 1]
module = classes.map(lambda one: one.__module__.split(".")[1])
vectorizer = CountVectorizer(stop_words="english", token_pattern="[a-z]{4,}", min_df=4, max_df=0.3)
X = vectorizer.fit_transform(classes.map(lambda one: one.__doc__))
words = vectorizer.get_feature_names_out()
stored = X.nnz / np.prod(X.shape)
print(f"{X.shape[0]} documents, {X.shape[1]} words, {X.sum()} counts, {stored:.0%} stored")

# %% [markdown]
# The table stays sparse in the fit. `size_factors="total"` takes out the length of a document:
# otherwise the first topic might be "long".

# %%
L = 4 if small else 6
model = pnmf_pyro.fit(X, n_components=L, size_factors="total", random_state=0)
model.feature_names_in_ = words
axes = plotting.plot_top_features(model, 8, by="specificity")

# %% [markdown]
# Most lists read as a topic: decompositions, linear models, neighbours and clusters, trees.
# `specificity` puts first what is frequent in one topic and rare in the others.
#
# ## Which words mark a topic, and how sure that is
#
# A list has a first word also where nothing is sure. `differential_features` compares the share of
# a word in a topic with that in each other topic, and keeps the comparison that is the least sure.
# `lfsr` is the probability that the word is not more frequent in this one.

# %%
table = pnmf_pyro.differential_features(model)
marks = table[(table["lfsr"] < 0.05) & (table["mean"] > 0)].sort_values("lfsr")
print(f"{len(marks)} of {len(words)} words mark one topic surely:")
for topic, found in marks.groupby("component")["feature"]:
    print(f"{topic}: {', '.join(found[:8])}{f' and {len(found) - 8} more' * (len(found) > 8)}")

# %%
axes = plotting.plot_volcano(model, 3)

# %% [markdown]
# Each dot is a word. To the right of 0 are those that are more frequent in this topic than in any
# other, and the higher the surer. The topic of trees has most of them. The first topic has three:
# its words are in other documents as well. A word that two topics share marks neither, so more
# topics leave fewer sure words. With eight of them 15 words are sure. `against="each"` compares
# topics two by two.
#
# ## Topics and labels
#
# The share of each topic in the expected words of a document, as a mean over the documents of a
# module.

# %%
shares = pnmf_pyro.contributions(model)
shares = pd.DataFrame(shares / shares.sum(1, keepdims=True), classes.index)
frequent = module.value_counts().head(12).index
means = shares.groupby(module).mean().loc[frequent]
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
image = ax.imshow(means, vmin=0, vmax=1, aspect="auto")
ax.set_xticks(range(L), range(L))
ticks = ax.set_yticks(
    range(len(frequent)), [f"{name} ({(module == name).sum()})" for name in frequent]
)
ax.set_xlabel("topic")
bar = fig.colorbar(image, label="mean share of the words")

# %% [markdown]
# The fit was told no module, and many modules are in one topic: `ensemble` in that of trees,
# `cluster`, `neighbors` and `manifold` in that of distances. `covariance` goes with the linear
# models, since one of its classes is a lasso. `svm`, `feature_selection` and `feature_extraction`
# share a topic that is neither: six topics are few for so many modules.
#
# ## Short documents are uncertain
#
# The standard deviation of the logarithm of a factor: 0.1 is about ten per cent. Here for the main
# topic of each document, against its number of words.

# %%
main = shares.to_numpy().argmax(1)
sd = transforms.factor_uncertainty(model)[np.arange(len(main)), main]
fig, ax = plt.subplots(figsize=(4.5, 3.2), layout="constrained")
ax.semilogx(np.ravel(X.sum(1)), sd, ".")
ax.set(xlabel="words of the document that were counted", ylabel="sd of the main topic")
ax.minorticks_off()
ticks = ax.set_xticks([50, 100, 200, 400, 800], [50, 100, 200, 400, 800])

# %% [markdown]
# The shorter a document, the less sure its topic: about 0.2 at fifty words, 0.13 at five hundred.
#
# ## New documents
#
# `transform` finds the topics of other texts, with the words as they are. Words that the fit does
# not know play no part.

# %%
texts = {
    "about trees": "An ensemble of trees. Each split of a node lowers the impurity of its leaves.",
    "about clusters": "Each sample joins the cluster whose centre is the nearest by its distance.",
    "both": "Trees of neighbors: each node is split by the distance to the nearest cluster.",
}
factors = model.transform(vectorizer.transform(texts.values()), size_factors="total")
found = factors * model.components_.sum(1)
pd.DataFrame(found / found.sum(1, keepdims=True), texts.keys()).round(2)

# %% [markdown]
# A text of a dozen words is enough to name its main topic. The last one is of two topics, and is
# found to be.
#
# ## What to try next
#
# - `select_n_components(X, range(4, 20, 4))` compares numbers of topics by words that were held out
#   (notebook 06).
# - `likelihood="auto"`: words come in bursts, and a negative binomial may suit them better.
# - `covariates=` takes out what you know of a document, such as its year or its author.
# - Your own texts: `CountVectorizer` reads files, and a table of any other program works as well.
