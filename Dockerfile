# SGLang's own image with the plugin in it; README.md has the two commands.
ARG SGLANG_TAG=v0.5.23
FROM lmsysorg/sglang:${SGLANG_TAG}

# Ubuntu's mark on its Python, in which SGLang's image installs SGLang itself
ENV PIP_BREAK_SYSTEM_PACKAGES=1
WORKDIR /opt/mixedprec
COPY pyproject.toml setup.cfg setup.py README.md LICENSE ./
COPY configs configs
COPY schemas schemas
COPY mixedprec_plugin mixedprec_plugin
# pip may add packages, and change none that the image has
RUN python3 -m pip list --format=freeze > constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint constraints.txt . \
    && rm -r build ./*.egg-info
WORKDIR /work
RUN mixedprec presets
EXPOSE 30000
ENTRYPOINT ["mixedprec"]
CMD ["--help"]
