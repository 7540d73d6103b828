# docker build --build-arg PIP_EXTRA_INDEX_URL=... -t meme-classifier .
#
# Without that argument, pip installs PyTorch with its CUDA libraries, 5 GB that the page does not need. With the
# address of PyTorch's index of CPU wheels (see "Get started" on its web site), pip prefers those of the same version.
FROM python:3.12-slim AS program

ARG PIP_EXTRA_INDEX_URL=""
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
WORKDIR /app

COPY requirements.txt requirements.lock ./
RUN pip install --no-cache-dir -r requirements.txt -c requirements.lock

COPY LICENSE MODEL_CARD.md *.py style.css client.js background.png best_model.pth best_model.pth.sha256 ./
COPY formats formats
COPY photo_library photo_library
ENV HOME=/tmp MPLCONFIGDIR=/tmp

# For deploy/watch.compose.yaml: docker build --target watch
FROM program AS watch
COPY requirements-library.txt ./
RUN pip install --no-cache-dir -r requirements-library.txt -c requirements.lock
ENTRYPOINT ["python", "classify.py"]

FROM program
COPY .streamlit .streamlit
COPY examples examples
# The page says what its probabilities are worth on unseen pictures.
COPY outputs/metrics.json outputs/

# The file system is read-only for this user; Matplotlib needs a folder for its list of fonts.
RUN useradd --system --uid 10001 --no-create-home visitor
USER 10001

EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4)"]
CMD ["streamlit", "run", "serve.py", "--server.address=0.0.0.0", "--server.headless=true"]
