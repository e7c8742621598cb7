# The documentation is true: what it says can be typed is run, what it says is
# seen is compared, and what there is to document is documented.
#
# Each page (README.md and doc/*.md) gets a database of its own, and one psql
# session to which its blocks are given in order.  In a page
#
# - ```sql starts a block to be run.  Every statement must succeed, unless the
#   page shows its error (below).  Blocks that are not for psql, or that cannot
#   be run here, are marked as another language (sh, conf, log) or as none.
# - ```text, when it is the next block after one of sql, is what psql shows
#   for the last statement of that block: a table, or an error with its detail
#   and hint.  "..." in it stands for what may differ.  Trailing spaces do not
#   matter.
# - "-- 12" after a statement, on the line where it ends, is its result, one
#   value: a number, true, false, null or 'text'.  A remark may follow after a
#   colon ("-- 12: not yet stored").  Other comments are comments.
# - <!--sql ... --> is a block that is run and not seen by readers: what a page
#   takes for granted.
#
# For those who read only the reference, all that can be looked up must be in
# it: functions, options, settings, columns, and the messages in the sources,
# with their SQLSTATEs.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run qw(run);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $root = "$FindBin::RealBin/..";
my $mark = 'end of a statement';

plan skip_all => 'no documentation here' unless -e "$root/doc/reference.md";

# blocks(TEXT): the blocks of a page: line, kind (sql or text), content.
sub blocks
{
	my ($text) = @_;
	my @blocks;
	my ($block, $end);
	my $line = 0;

	foreach (split /\n/, $text)
	{
		$line++;
		if (defined $block)
		{
			if (/$end/)
			{
				push @blocks, $block;
				undef $block;
			}
			else
			{
				$block->{content} .= "$_\n";
			}
		}
		elsif (/^(\s*)```(\w*)\s*$/ or /^(\s*)<!--(sql)\s*$/)
		{
			$block = { line => $line, kind => $2, content => '' };
			$end = /```/ ? qr/^\s*```\s*$/ : qr/^\s*-->\s*$/;
		}
	}
	die "a block is not closed" if defined $block;
	return @blocks;
}

# statements(SQL): each with its text and the value that its comment tells.
sub statements
{
	my ($sql) = @_;
	my @statements;
	my $current = '';

	while ($sql =~ m{\G(
			 --[^\n]*
			| /\*.*?\*/
			| '(?:[^']|'')*'
			| "[^"]*"
			| \$(\w*)\$.*?\$\2\$
			| ;[ \t]*(?:--[^\n]*)?
			| (?:(?<=\n)|\A)\\[^\n]*\n
			| .)}gcsx)
	{
		my $token = $1;

		$current .= $token;
		next unless $token =~ /^[;\\]/;
		my %statement = (text => $current);
		$statement{value} = $1
		  if $token =~ /^;\s*--\s*(-?\d+|true|false|null|'[^']*')(?:$|:\s)/;
		push @statements, \%statement;
		$current = '';
	}
	die "a statement is not ended: $current" if $current =~ s/--[^\n]*//gr =~ /\S/;
	return @statements;
}

# What psql shows, without what does not matter.
sub tidy
{
	my ($text) = @_;

	$text =~ s/[ \t]+$//mg;
	$text =~ s/^\n+//;
	$text =~ s/\n+\z//;
	return $text;
}

# Is this the result, one value?
sub shows_value
{
	my ($output, $value) = @_;
	my @lines = split /\n/, tidy($output);

	return 0 unless @lines == 4 && $lines[1] =~ /^-+$/ && $lines[3] eq '(1 row)';
	$value = { true => 't', false => 'f', null => '' }->{$value} // $value;
	$value =~ s/^'(.*)'$/$1/;
	return $lines[2] =~ s/^\s+//r eq $value;
}

# May this be what the page says is shown?
sub shows_text
{
	my ($output, $text) = @_;
	my $pattern = join '[^\n]*', map { quotemeta } split /\.\.\./, tidy($text), -1;

	return tidy($output) =~ /\A$pattern\z/;
}

# run_page(NODE, DATABASE, TEXT): runs the blocks of a page.  Returns for each
# block of sql its line and what is wrong with it, or nothing.
sub run_page
{
	my ($node, $database, $text) = @_;
	my @blocks = blocks($text);
	my @todo;
	my @outputs;
	my $script = '';
	my $output = '';

	foreach my $i (0 .. $#blocks)
	{
		my @statements;

		next if $blocks[$i]{kind} ne 'sql';
		@statements = statements($blocks[$i]{content});
		$statements[-1]{shown} = $blocks[ $i + 1 ]{content}
		  if $i < $#blocks && $blocks[ $i + 1 ]{kind} eq 'text';
		push @todo, { line => $blocks[$i]{line}, statements => \@statements };
		$script .= "$_->{text}\n\\echo $mark\n" foreach @statements;
	}
	return unless @todo;

	$node->safe_psql('postgres', "CREATE DATABASE $database");
	# a statement that waits for ever is wrong, too
	local $ENV{PGOPTIONS} = '-c TimeZone=UTC -c statement_timeout=' . 1000 * $PostgreSQL::Test::Utils::timeout_default;
	run([ 'psql', '-X', '-q', '-d', $node->connstr($database) ],
		'<', \$script, '>&', \$output);
	@outputs = split /^$mark\n/m, $output, -1;

	foreach my $block (@todo)
	{
		my $wrong = '';

		foreach my $statement (@{ $block->{statements} })
		{
			my $shown = shift(@outputs) // 'nothing, psql has ended';
			my $said;

			if (defined $statement->{shown})
			{
				next if shows_text($shown, $statement->{shown});
				$said = tidy($statement->{shown});
			}
			elsif (defined $statement->{value})
			{
				next if shows_value($shown, $statement->{value});
				$said = $statement->{value};
			}
			else
			{
				next unless $shown =~ /^(ERROR|FATAL|PANIC|invalid command|nothing)/m;
				$said = 'no error';
			}
			$wrong .= "statement:\n$statement->{text}\nthe page says:\n$said\nbut psql shows:\n" . tidy($shown) . "\n";
		}
		$block->{wrong} = $wrong;
	}
	$node->safe_psql('postgres', "DROP DATABASE $database WITH (FORCE)");
	return @todo;
}

my $node = new_node('docs');

# That this test can fail: a page of which every other block is wrong.
my @checks = run_page($node, 'wrong', <<'PAGE');
```sql
SELECT 1; -- 1
SELECT 'a;b', $$;$$ /* ; */; -- 3 is not said
```
```sql
SELECT 1; -- 2
```
Text.
```sql
SELECT 1 AS a, 'xyz' AS b;
```
```text
 a |  b
---+-----
 1 | x...
(1 row)
```
```sql
SELECT 1 AS a;
```
```text
 a
---
 2
(1 row)
```
```sql
SELECT 1;
SELECT 1 / 0;
```
```text
ERROR:  division by zero
```
```sql
SELECT 1 / 0;
```
```sh
this is not run
```
<!--sql
SELECT true; -- true: not seen
-->
```sql
SELECT 1;
```
```text
ERROR:  division by zero
```
PAGE
is_deeply([ map { $_->{wrong} ne '' ? 'wrong' : 'right' } @checks ],
	[ ('right', 'wrong') x 4 ], 'a page that is wrong is found out');

# The pages
my %pages;
foreach my $file ('README.md', map { s{^\Q$root\E/}{}r } sort glob "$root/doc/*.md")
{
	my $name = lc($file =~ s/\W+/_/gr);

	$pages{$file} = slurp_file("$root/$file");
	foreach my $check (run_page($node, $name, $pages{$file}))
	{
		is($check->{wrong}, '', "$file, line $check->{line}");
	}
}

# Links lead somewhere.  (What a run of the benchmark makes need not be there.)
foreach my $file (sort keys %pages)
{
	my $folder = $file =~ s{[^/]*$}{}r;
	my @missing;

	my @links = $pages{$file} =~ /\]\(([^)\s]+)\)/g;

	foreach my $link (@links)
	{
		my ($path, $anchor) = split /#/, $link, 2;
		my $target = $file;

		next if $path =~ /^https?:/;
		$target = "$folder$path" if $path ne '';
		1 while $target =~ s{[^/]+/\.\./}{};
		next if $target =~ m{^bench/results/};
		push @missing, $link unless -e "$root/$target";
		next unless defined $anchor && exists $pages{$target};
		my %anchors = map { s/[^\w\- ]//gr =~ s/ /-/gr => 1 }
		  map { lc } $pages{$target} =~ /^#+ +(.*?) *$/mg;
		push @missing, $link unless $anchors{$anchor};
	}
	is("@missing", '', "$file: links lead to what is there");
}

# What there is, by the catalogs and the sources, is in the reference.
my $reference = $pages{'doc/reference.md'};

sub all_documented
{
	my ($what, @all) = @_;
	my @missing = grep { index($reference, $_) < 0 } @all;

	ok(@all > 0 && @missing == 0, "the reference has all $what (" . scalar(@all) . ')')
	  or diag("missing:\n", map { "$_\n" } @missing);
}

$node->safe_psql('postgres', 'CREATE TABLE plain ()');
all_documented('functions', split /\n/, $node->safe_psql('postgres', q{
	SELECT regexp_replace(format('%s(%s) → %s', proname,
			regexp_replace(pg_get_function_arguments(p.oid), ',? ?OUT .*', ''),
			lower(pg_get_function_result(p.oid))),
		'(NULL|''-'')::\w+', '\1', 'g')
	FROM pg_proc p JOIN pg_depend d ON d.classid = 'pg_proc'::regclass AND d.objid = p.oid
	WHERE d.refobjid = (SELECT oid FROM pg_extension WHERE extname = 'statbuffer') AND d.deptype = 'e'
	ORDER BY 1}));

my (undef, undef, $hint) = $node->psql('postgres', q{
	CREATE FOREIGN TABLE wrong (key text, count bigint) SERVER statbuffer OPTIONS (nonsense '1')});
$hint =~ /Valid options of a buffer are: (.*)\./;
all_documented('options', map { "| `$_` |" } split /, /, $1 // '');

all_documented('settings', map { "| `$_` |" } split /\n/, $node->safe_psql('postgres', q{
	LOAD 'statbuffer'; SELECT name FROM pg_settings WHERE name LIKE 'statbuffer.%'}));

all_documented('columns', split /\n/, $node->safe_psql('postgres', q{
	SELECT format('| `%s` | %s |', attname, format_type(atttypid, atttypmod)) FROM pg_attribute
	WHERE attrelid = 'sb_stat_buffers'::regclass AND attnum > 0
	UNION ALL
	SELECT format('| `%s` | %s |', proargnames[i], format_type(proallargtypes[i], NULL))
	FROM pg_proc, generate_subscripts(proallargtypes, 1) i
	WHERE oid = 'sb_keys'::regproc AND proargmodes[i] = 'o'}));

# Messages: each on a line of the reference, or of operations.md for what is
# only in the log, with "…" for what varies and with its SQLSTATE.
my @sources = glob "$root/src/*.c";
SKIP:
{
	my %codes;
	my %seen;
	my @missing;
	my $header = qx{pg_config --includedir-server};
	my @lines = map { split /\n/ } @pages{qw(doc/reference.md doc/operations.md)};
	my $string = qr/((?:"(?:[^"\\]|\\.)*"|\s|U?INT64_FORMAT)+)/;

	skip 'no sources here', 2 unless @sources;
	chomp $header;
	if (-e "$header/utils/errcodes.h")
	{
		%codes = slurp_file("$header/utils/errcodes.h") =~
		  /#define (ERRCODE_\w+) MAKE_SQLSTATE\(([^)]*)\)/g;
		s/[^0-9A-Z]//g foreach values %codes;
	}

	foreach my $source (map { slurp_file($_) } @sources)
	{
		my @found;

		while ($source =~ /ereport\((.*?)\)\);/gs)
		{
			my $call = $1;
			my $code = $call =~ /errcode\((ERRCODE_\w+)\)/ ? $codes{$1} : undef;

			push @found, [ $1, $code ] while $call =~ /errmsg\($string/g;
			push @found, [ $1, $code ], [ $2, $code ]
			  while $call =~ /errmsg_plural\($string,$string/g;
		}
		push @found, [ $1, undef ] while $source =~ /\b_\($string\)/g;
		push @found, [ $1, undef ] while $source =~ /message = psprintf\($string/g;
		foreach (@found)
		{
			my ($message, $code) = @$_;

			$message =~ s/"\s*U?INT64_FORMAT\s*"/…/g;
			$message =~ s/"\s*U?INT64_FORMAT\s*/…"/g;
			$message =~ s/"\s+"//g;
			$message =~ s/^\s*"|"\s*$//g;
			$message =~ s/\\"/"/g;
			$message =~ s/%(?:[.*\dlz]*[a-z])/…/g;
			$seen{$message} = 1;
			next if grep { index($_, "`$message`") >= 0 && (!$code || /\b$code\b/) } @lines;
			push @missing, ($code // '') . " $message";
		}
	}
	ok(keys %seen > 60, 'messages were found in the sources (' . keys(%seen) . ')');
	is(join("\n", @missing), '', 'and all are documented, with their SQLSTATEs');

	my %names;
	foreach my $source (map { slurp_file($_) } @sources)
	{
		$names{"| `$_` |"} = 1
		  foreach $source =~ /(?:compat_wait_event\(|LWLockRegisterTranche\([^"]*)"(\w+)"/g;
	}
	all_documented('wait events', sort keys %names);
}

$node->stop;
done_testing();
