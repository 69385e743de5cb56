# Two images with the versions of requirements.lock. Torch's packages bring the CUDA libraries with them:
#     docker build --target cuda -t mutor_img:cuda .
#     docker run --gpus all --ipc=host -v "$PWD/codes:/mutor_img/codes" -v "$PWD/runs:/mutor_img/runs" mutor_img:cuda \
#         torchrun --nproc-per-node 8 train.py --config configs/imagenet256/mutor2d_b_80.yaml
#     docker build --target cpu -t mutor_img:cpu .
#     docker run -v "$PWD/runs:/mutor_img/runs" mutor_img:cpu python -m mutor_img.study --config configs/mnist/study.yaml
FROM python:3.11-slim AS base
# torch.compile needs a C++ compiler, on GPUs too.
RUN apt-get update && apt-get install -y --no-install-recommends g++ make && rm -rf /var/lib/apt/lists/*
WORKDIR /mutor_img
COPY requirements.lock ./

FROM base AS cpu
RUN grep -Ev '^(nvidia|cuda|triton)' requirements.lock > cpu.lock \
    && pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r cpu.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .

FROM base AS cuda
RUN pip install --no-cache-dir -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps --editable .
