# bash completions for backbone, bbroker, bservice and brequest. The flags come from --help, and
# the service names from the broker, if one is running.

# _backbone_flags TOOL... prints each flag, followed by the name of its value if it takes one.
_backbone_flags() {
	"$@" --help 2>/dev/null | awk '/^ +(backbone )?-/ {
		sub(/^ +(backbone )?/, ""); sub(/  .*/, "")
		for (i = split($0, flags, ", "); i > 0; i--) {
			split(flags[i], part, " ")
			if (part[1] ~ /^--/) takes = part[2] ~ /^</ ? "" : part[2] # also for the short flag, which comes next
			print part[1], takes
		}
	}'
}

_backbone() {
	local tool=${1##*/} flag takes word value= rest= operands=0
	local -A flags
	local -a words broker run=("$1") request=(brequest)

	# Do not use COMP_WORDS: it splits endpoints at colons.
	read -ra words <<<"${COMP_LINE:0:COMP_POINT}"
	[[ ${COMP_LINE:0:COMP_POINT} != *[[:space:]] ]] || words+=("")
	local cur=${words[${#words[@]} - 1]}

	# After backbone and the name of an applet, complete as that applet. It may have no link.
	if [[ $tool == backbone ]]; then
		request=("$1" brequest)
		for word in $("$1" --list 2>/dev/null); do
			[[ ${#words[@]} -gt 2 && $word == ?(b)"${words[1]}" ]] || continue
			tool=$word run=("$1" "$word") words=("${words[@]:1}")
			break
		done
	fi

	while read -r flag takes; do
		flags[$flag]=$takes
	done < <(_backbone_flags "${run[@]}")
	for word in "${words[@]:1:${#words[@]}-2}"; do
		if [[ $value ]]; then
			[[ $value != @(-b|-p|--broker|--host|--port|--broker-key|--key) ]] || broker+=("$value" "${word/#\~\//$HOME/}")
			value=
		elif [[ $rest || $word != -?* ]]; then
			((++operands))
		elif [[ $word == -- ]]; then
			rest=yes
		elif [[ $word == @(-[bp]?*|--@(broker|host|port|broker-key|key)=*) ]]; then
			broker+=("$word")
		elif [[ ${flags[$word]} ]]; then
			value=$word
		fi
	done

	COMPREPLY=()
	if [[ $value ]]; then
		case ${flags[$value]} in
		DIR) COMPREPLY=($(compgen -d -- "$cur")) ;;
		FILE) COMPREPLY=($(compgen -f -- "$cur")) ;;
		WHERE) COMPREPLY=($(compgen -W "log reply merge" -- "$cur")) ;;
		esac
	elif [[ $cur == -* && ! $rest && $operands -lt 2 ]]; then
		COMPREPLY=($(compgen -W "${!flags[*]}" -- "$cur"))
	elif [[ $tool == backbone ]]; then
		[[ $operands != 0 ]] || COMPREPLY=($(compgen -W "$("$1" --list 2>/dev/null)" -- "$cur"))
	elif [[ $tool != bbroker && $operands = 0 ]]; then
		COMPREPLY=($(compgen -W "$("${request[@]}" -q -t 0.5 --list "${broker[@]}" 2>/dev/null | tail -n +2 | cut -f 1)" -- "$cur"))
		! declare -F __ltrim_colon_completions >/dev/null || __ltrim_colon_completions "$cur"
	elif [[ $tool = bservice && $operands = 1 ]]; then
		COMPREPLY=($(compgen -c -- "$cur"))
	elif [[ $tool != bbroker ]]; then
		COMPREPLY=($(compgen -f -- "$cur"))
	fi
}

complete -F _backbone backbone bbroker bservice brequest
