#!/bin/sh
# Pictures of mails, to be looked at: the HTML of each .eml file of a folder, such as one that [mail] dry_run has written, as a browser shows
# it, light and dark, 360 and 1000 pixels wide. Needs python3 and Chromium (Debian: chromium; fonts-noto-core and fonts-noto-color-emoji for
# other scripts and emoji).
#
#     scripts/pages.sh MAILS PICTURES     CHROMIUM=/path/to/chromium names another program
set -eu
mails=${1:?which folder has the .eml files?}
pictures=${2:?which folder are the pictures to go to?}
chromium=${CHROMIUM:-chromium}
command -v "$chromium" >/dev/null || { echo "there is no $chromium: apt-get install chromium" >&2; exit 1; }
mkdir -p "$pictures"
pictures=$(cd "$pictures" && pwd)
work=$(mktemp -d "${TMPDIR:-/tmp}/buildreactor-pages.XXXXXX")
trap 'rm -rf "$work"' EXIT

# Chromium's window cannot be narrower than 500 pixels, so the page is shown in a frame of the width that is meant, and as high as it
# is; what is wider than the frame would be cut off in the picture, and is reported.
cat >"$work/frame.py" <<'PYTHON'
import email, email.policy, html, pathlib, sys
mail, width, page = sys.argv[1], sys.argv[2], sys.argv[3]
message = email.message_from_bytes(pathlib.Path(mail).read_bytes(), policy=email.policy.default)
text = message.get_body(("html",)).get_content()
pathlib.Path(page).write_text(f"""<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body {{ margin: 0; background: #808080 }} iframe {{ border: 0; width: {width}px; display: block }}</style>
<iframe srcdoc="{html.escape(text)}" onload="let d = this.contentDocument.documentElement;
this.style.height = d.scrollHeight + 'px'; document.title = 'width ' + d.scrollWidth + ' height ' + d.scrollHeight"></iframe>""")
PYTHON

# --disable-...: nothing is to be looked up. No sandbox for root, whom Chromium's refuses.
show() {
    "$chromium" --headless --disable-gpu --no-first-run --disable-background-networking --disable-component-update --disable-sync \
        $([ "$(id -u)" != 0 ] || echo --no-sandbox) --user-data-dir="$work/profile" --hide-scrollbars \
        --blink-settings=preferredColorScheme="$scheme" "$@" "file://$work/page.html" 2>>"$work/chromium.log"
}
for mail in "$mails"/*.eml; do
    [ -e "$mail" ] || { echo "there is no .eml file in $mails" >&2; exit 1; }
    for width in 360 1000; do
        python3 "$work/frame.py" "$mail" "$width" "$work/page.html"
        for colours in light:1 dark:0; do
            scheme=${colours#*:}
            size=$(show --window-size="$width,1000" --dump-dom | sed -n 's/.*<title>width \([0-9]*\) height \([0-9]*\)<.*/\1 \2/p')
            [ -n "$size" ] || { cat "$work/chromium.log" >&2; exit 1; }
            [ "${size% *}" -le "$width" ] || echo "$mail is ${size% *} pixels wide where $width are there" >&2
            height=${size#* }
            [ "$height" -le 8000 ] || height=8000
            picture="$pictures/$(basename "$mail" .eml).$width.${colours%:*}.png"
            show --window-size="$width,$height" --screenshot="$picture"
            echo "$picture"
        done
    done
done
