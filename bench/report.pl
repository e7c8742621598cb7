# Makes of the values that dev/bench has measured the table that it prints, and
# the files in bench/results, which README.md here tells about.  Arguments: the
# directory of these, the directory with the values, the groups that were
# measured, with commas between, and what to write above the table.

use strict;
use warnings;

use List::Util qw(max min);

my ($results, $work, $measured, $about) = @ARGV;
my %measured = map { $_ => 1 } split /,/, $measured;

# --- values -----------------------------------------------------------------

# The series in order, and by name, which is "group what who n".
my (@series, %series);

# What callgrind tells of functions, as lines.
my @functions;

sub median
{
	my @sorted = sort { $a <=> $b } @_;
	my $middle = int(@sorted / 2);

	return undef if !@sorted;
	return @sorted % 2
	  ? $sorted[$middle]
	  : ($sorted[ $middle - 1 ] + $sorted[$middle]) / 2;
}

sub add_values
{
	my ($group, $what, $who, $n, $unit, @values) = @_;
	my $name = "$group $what $who $n";

	if (!$series{$name})
	{
		$series{$name} = {
			group => $group,
			what => $what,
			who => $who,
			n => $n,
			unit => $unit,
			values => []
		};
		push @series, $series{$name};
	}
	push @{ $series{$name}->{values} }, @values;
	return;
}

# The lines of a file that may not be there, without its heads.
sub read_lines
{
	my ($file, $heads) = @_;

	open my $handle, '<', $file or return;
	my @lines = <$handle>;
	close $handle;
	chomp @lines;
	return @lines[ $heads .. $#lines ];
}

# Those of earlier runs, of groups that were not measured this time.
foreach my $line (read_lines("$results/results.csv", 1))
{
	my ($group, $what, $who, $n, $unit, undef, undef, undef, $values) =
	  split /,/, $line;
	add_values($group, $what, $who, $n, $unit, split / /, $values)
	  if !$measured{$group};
}
foreach my $line (read_lines("$work/values.csv", 0))
{
	my ($group, $what, $who, $n, $unit, undef, $value) = split /,/, $line;
	add_values($group, $what, $who, $n, $unit, $value) if $measured{$group};
}
@functions = read_lines(
	$measured{instructions}
	? ("$work/functions.csv", 0)
	: ("$results/instructions.csv", 1));

sub values_of
{
	my ($name) = @_;

	return $series{$name} ? @{ $series{$name}->{values} } : ();
}

# --- rows -------------------------------------------------------------------

my @rows;

# What was measured and what with, as told by the names of series; what the
# ratio, or else the value, is to be.  The ratio is that of the medians; its
# range is that of the ratios of each round.
sub ratio_row
{
	my ($what, $ours, $other, $target) = @_;
	my @ours = values_of($ours);
	my @other = values_of($other);
	my $row = { what => $what, target => $target };

	return if !@ours || !@other;
	$row->{group} = $series{$ours}->{group};
	$row->{unit} = $series{$ours}->{unit};
	$row->{ours} = median(@ours);
	$row->{other} = median(@other);
	$row->{ratio} = $row->{ours} / $row->{other};
	if (@ours == @other)
	{
		my @ratios = map { $ours[$_] / $other[$_] } 0 .. $#ours;
		($row->{least}, $row->{most}) = (min(@ratios), max(@ratios));
	}
	push @rows, $row;
	return;
}

# A value that stands for itself, and another one that is only shown.
sub value_row
{
	my ($what, $ours, $other, $target, $worst) = @_;
	my @ours = values_of($ours);
	my @other = $other ? values_of($other) : ();

	return if !@ours;
	push @rows,
	  {
		what => $what,
		target => $target,
		group => $series{$ours}->{group},
		unit => $series{$ours}->{unit},
		ours => $worst ? max(@ours) : median(@ours),
		other => !@other ? undef : $worst ? max(@other) : median(@other)
	  };
	return;
}

# How what we keep from one number of clients to another compares with what
# the function that does nothing keeps.
sub kept_row
{
	my ($what, $target) = @_;
	my %kept;

	foreach my $who ('statbuffer', 'no-op')
	{
		my @many = values_of("throughput one $who 256");
		my @few = values_of("throughput one $who 64");
		return if !@many || @many != @few;
		$kept{$who} = median(@many) / median(@few);
		$kept{"$who rounds"} =
		  [ map { $many[$_] / $few[$_] } 0 .. $#many ];
	}
	my @ratios =
	  map { $kept{'statbuffer rounds'}->[$_] / $kept{'no-op rounds'}->[$_] }
	  0 .. $#{ $kept{'no-op rounds'} };
	push @rows,
	  {
		what => $what,
		target => $target,
		group => 'throughput',
		unit => 'of 64',
		ours => $kept{statbuffer},
		other => $kept{'no-op'},
		ratio => $kept{statbuffer} / $kept{'no-op'},
		least => min(@ratios),
		most => max(@ratios)
	  };
	return;
}

# A figure that is bounded by something else has that below it.
sub make_rows
{
	my ($t, $s) = ('throughput', 'statement');

	ratio_row('1,000,000 increments of one key in a statement / no-op',
		"$s one statbuffer 1000000", "$s one no-op 1000000", '<= 1.20');
	ratio_row('the same of 10,000 keys / no-op',
		"$s 10000 statbuffer 1000000", "$s 10000 no-op 1000000", '<= 1.50');

	ratio_row("64 clients, one key / no-op",
		"$t one statbuffer 64", "$t one no-op 64", '>= 0.97');
	ratio_row("64 clients, 10,000 keys uniformly / no-op",
		"$t uniform statbuffer 64", "$t uniform no-op 64");
	ratio_row("64 clients, 10,000 keys by Zipf / no-op",
		"$t zipf statbuffer 64", "$t zipf no-op 64");
	ratio_row("$_ client" . ($_ > 1 ? 's' : '') . ", one key / no-op",
		"$t one statbuffer $_", "$t one no-op $_")
	  foreach 1, 8, 256;
	ratio_row("64 clients, one key / UPDATE of a row",
		"$t one statbuffer 64", "$t one update 64", '>= 100');
	ratio_row("  the bound: no-op / UPDATE of a row",
		"$t one no-op 64", "$t one update 64");
	ratio_row("  100 in a transaction, by PL/pgSQL / UPDATE of a row",
		"$t hundred statbuffer 64", "$t hundred update 64");
	ratio_row("  the bound: no-op / UPDATE of a row",
		"$t hundred no-op 64", "$t hundred update 64");
	foreach (
		[ 'UPDATE of an unlogged row' => 'update-unlogged' ],
		[ 'UPDATE of a row, synchronous_commit off' => 'update-async' ],
		[ 'UPDATE of one of 64 rows' => 'slotted' ],
		[ 'INSERT of a row, rolled up each second' => 'append' ],
		[ 'nextval' => 'nextval' ])
	{
		ratio_row("64 clients, one key / $_->[0]",
			"$t one statbuffer 64", "$t one $_->[1] 64");
	}
	kept_row('256 clients over 64, one key: what is kept / what no-op keeps',
		'>= 0.90');
	ratio_row('64 clients / Redis INCR',
		"$t one statbuffer 64", "$t one redis 64", '>= 1');
	ratio_row('  the bound: no-op / Redis INCR',
		"$t one no-op 64", "$t one redis 64");
	ratio_row('64 clients, pipelines of 16 / Redis INCR, pipelines of 16',
		"$t pipelined statbuffer 64", "$t pipelined redis 64");
	ratio_row('  the bound: no-op, pipelines of 16 / Redis INCR',
		"$t pipelined no-op 64", "$t pipelined redis 64");

	foreach (
		[ 'sb_trigger, by row' => 'sb_trigger-row', '>= 0.97' ],
		[ 'sb_trigger, by statement' => 'sb_trigger-statement', '>= 0.97' ],
		[ 'a PL/pgSQL trigger that increments' => 'plpgsql' ],
		[ 'a PL/pgSQL trigger that updates a row' => 'update' ])
	{
		ratio_row("TPC-B-like, 8 clients, $_->[0] / without a trigger",
			"trigger tpc-b $_->[1] 8", 'trigger tpc-b none 8', $_->[2]);
	}

	foreach my $case (
		[ full => 'keys that the table has', '<= 0.90' ],
		[ empty => 'new keys', '<= 1.0' ])
	{
		my $f = "flush $case->[0]";
		ratio_row("100,000 $case->[1]: target / upserts by hand",
			"$f target 100000", "$f upsert 100000", $case->[2]);
		ratio_row('  in one transaction / the same by hand',
			"$f target-in-one 100000", "$f upsert-in-one 100000", $case->[2]);
		ratio_row("100,000 $case->[1]: array handler / upserts by hand",
			"$f array 100000", "$f upsert 100000", '<= 1.15');
		ratio_row('  in one transaction / the same by hand',
			"$f array-in-one 100000", "$f upsert-in-one 100000", '<= 1.15');
		ratio_row('  one by one / a loop that calls the handler',
			"$f one 100000", "$f loop-of-calls 100000", '<= 1.15');
		ratio_row('  one by one / a loop of upserts',
			"$f one 100000", "$f loop 100000", '<= 1.15');
	}

	foreach (
		[ 'INSERT of a row of that size, no index' => 'insert', '>= 1.0' ],
		[ 'UPDATE of the row' => 'update', '>= 10' ],
		[ 'INSERT of a row, rolled up each second' => 'append', '>= 1.1' ],
		[ 'one that is not durable' => 'soft' ])
	{
		ratio_row("64 clients, one durable increment / $_->[0]",
			'durable one durable 64', "durable one $_->[1] 64", $_->[2]);
	}
	ratio_row('TPC-B-like, 8 clients, durable sb_trigger / without a trigger',
		'durable tpc-b-on durable 8', 'durable tpc-b-on none 8', '>= 0.95');
	ratio_row('  the same, synchronous_commit off',
		'durable tpc-b-off durable 8', 'durable tpc-b-off none 8', '>= 0.93');
	value_row('WAL of a transaction with one durable increment, beyond its commit',
		'durable wal durable 1', undef, '<= 160');
	ratio_row('flush of 100,000 keys, durable / not durable',
		'durable flush durable 100000', 'durable flush soft 100000', '<= 1.20');
	value_row('recovery of 1,000,000 keys after a crash',
		'durable recovery durable 1000000', undef, '<= 5');
	value_row('  the worst commit of 4 clients meanwhile',
		'durable worst-commit recovery 4', undef, '<= 50');
	value_row('8 clients while a ledger of 4 MB is rotated; not rotated: the worst commit',
		'durable worst-commit ledger-4MB 8', 'durable worst-commit ledger-1GB 8', '<= 50', 1);
	value_row('the ledger after 10,000,000 increments of 10,000 keys',
		'durable ledger-size durable 10000000', undef, '<= 128');

	value_row('memory for each of 1,000,000 keys of 16 bytes, pages in use',
		'memory all statbuffer 1000000', undef, '<= 92');
	value_row("  of that, $_", "memory $_ statbuffer 1000000")
	  foreach 'counters', 'buckets', 'allocator';
	value_row('  pages that wait for the next keys', 'memory waiting statbuffer 1000000');
	value_row('  as sb_stat_buffers tells', 'memory accounted statbuffer 1000000');
	ratio_row('all segments with 1,001 keys after ten million / 2 times what is held + 16 MB',
		'memory after statbuffer 10000000', 'memory after bound 10000000', '<= 1');
	value_row('  with all of them', 'memory before statbuffer 10000000');
	value_row('  when they were just freed', 'memory sparse statbuffer 10000000');
	value_row('  from then on, until it was no more than that',
		'memory until-met statbuffer 10000000', undef, '<= 60');

	foreach (
		[ '1,000,000 keys held, 100 due each second, at once' => 'once-million' ],
		[ '10,000 keys held, 100 due each second, at once' => 'once-few' ],
		[ '1,000,000 keys held, 100 due each second, one by one' => 'spread-million' ],
		[ '10,000 keys held, 100 due each second, one by one' => 'spread-few' ])
	{
		value_row("$_->[0]: CPU", "idle $_->[1] worker 1", undef,
			$_->[1] =~ /^once/ ? '< 0.5' : undef);
	}
	value_row('wake-ups of all processes while nothing is due, in a minute',
		'idle wake-ups all 60', undef, '<= 0');

	ratio_row('INSERT of 1,000,000 new keys / into an unlogged table',
		'bulk insert new-keys 1000000', 'bulk insert unlogged 1000000', '<= 1.5');
	ratio_row('INSERT of 1,000,000 keys that are held / the same',
		'bulk insert held-keys 1000000', 'bulk insert unlogged 1000000');
	ratio_row('COMMIT of 1,000,000 new keys in 1,000 open savepoints / in none',
		'bulk commit savepoints-open 1000000', 'bulk commit savepoints-none 1000000', '<= 1.2');

	value_row('8 clients while 1,000,000 keys are selected: the worst',
		'stall worst select 8', 'stall worst none 8', '<= 50', 1);
	value_row('  99 of 100 are faster than', 'stall p99 select 8', 'stall p99 none 8');
	value_row('4 clients while 5,000,000 keys are made: the worst commit',
		'growth commit-growing worst-of-all 5000000', 'growth commit-growing worst 0');
	value_row('  the longest call that makes one',
		'growth call-growing worst-of-all 5000000', undef, '<= 5');
	value_row('  the worst commit while 10,000,000 are made in one transaction',
		'growth commit-at-once worst 10000000', 'growth commit-growing worst 0');

	value_row('fast stop with 10,000,000 keys of 16 bytes, all saved; to write and sync as much',
		'saved stop statbuffer 10000000', 'saved stop write 10000000', '<= 8');
	value_row('  start, until they are loaded; to visit as many counters',
		'saved load statbuffer 10000000', 'saved load walk 10000000', '<= 5');
	value_row('  the file', 'saved bytes statbuffer 10000000');

	foreach my $n (1000, 5000)
	{
		my $many = $n == 1000 ? '1,000' : '5,000';

		value_row("$many busy buffers, interval 1 s, 4 workers: flushes a second",
			"scale flushes statbuffer $n", undef, '>= 300');
		value_row('  the latest key is late by',
			"scale latest statbuffer $n", undef, $n == 1000 ? '<= 4' : undef, 1);
	}

	foreach (
		[ 'a call, one key' => 'one', 100000 ],
		[ 'a call, 10,000 keys' => '10000', 100000 ],
		[ 'a transaction, one key' => 'transaction', 1000 ])
	{
		my $i = "instructions $_->[1]";
		ratio_row("instructions of $_->[0] / no-op",
			"$i statbuffer $_->[2]", "$i no-op $_->[2]");
		value_row("  of that in statbuffer's own code", "$i statbuffer-own $_->[2]");
	}
	return;
}

sub is_met
{
	my ($row) = @_;
	my $value = defined $row->{ratio} ? $row->{ratio} : $row->{ours};

	return '' if !$row->{target};
	my ($sign, $bound) = split / /, $row->{target};
	my $met =
	    $sign eq '<=' ? $value <= $bound
	  : $sign eq '<' ? $value < $bound
	  :                $value >= $bound;
	return $met ? 'yes' : 'no';
}

# --- files ------------------------------------------------------------------

sub write_lines
{
	my ($file, @lines) = @_;

	return if @lines < 2;
	open my $handle, '>', "$results/$file" or die "$results/$file: $!";
	print $handle map { "$_\n" } @lines;
	close $handle or die "$results/$file: $!";
	return;
}

sub figure
{
	my ($value) = @_;

	return '' if !defined $value;
	return sprintf('%.0f', $value) if $value >= 1000;
	return sprintf('%.1f', $value) if $value >= 100;
	return sprintf('%.2f', $value) if $value >= 1 || $value == 0;
	return sprintf('%.3f', $value);
}

sub table_lines
{
	my $format = '%-66s %10s %10s %-14s %8s %-15s %-8s %s';
	my @lines = (sprintf $format,
		'', 'ours', 'other', '', 'ratio', 'in rounds', 'target', 'met');

	foreach my $row (@_)
	{
		push @lines, sprintf $format, $row->{what}, figure($row->{ours}),
		  figure($row->{other}), $row->{unit}, figure($row->{ratio}),
		  defined $row->{least}
		  ? figure($row->{least}) . ' to ' . figure($row->{most})
		  : '', $row->{target} || '', is_met($row);
	}
	s/ +$// foreach @lines;
	return @lines;
}

sub table_csv
{
	return (
		'group,what,ours,other,unit,ratio,least,most,target,met',
		map {
			join ',', $_->{group}, '"' . $_->{what} . '"',
			  (map { figure($_) } $_->{ours}, $_->{other}), $_->{unit},
			  (map { figure($_) } $_->{ratio}, $_->{least}, $_->{most}),
			  $_->{target} || '', is_met($_)
		} @rows);
}

sub summary
{
	my @values = @_;

	return map { sprintf '%.6g', $_ } median(@values), min(@values), max(@values);
}

sub results_csv
{
	return (
		'group,what,who,n,unit,median,least,most,rounds',
		map {
			my $s = $_;
			join ',', (map { $s->{$_} } 'group', 'what', 'who', 'n', 'unit'),
			  summary(@{ $s->{values} }), join(' ', @{ $s->{values} })
		} @series);
}

# Those who are compared by clients, side by side.
sub clients_csv
{
	my @who = (
		'no-op', 'statbuffer', 'update', 'update-unlogged', 'update-async',
		'slotted', 'append', 'nextval', 'redis');

	my @lines = join ',', 'clients', @who;
	foreach my $clients (1, 8, 64, 256)
	{
		my @values =
		  map { figure(median(values_of("throughput one $_ $clients"))) } @who;
		push @lines, join ',', $clients, @values if grep { $_ ne '' } @values;
	}
	return @lines;
}

# What grows, and what of it is ours: what the function that does nothing takes
# is taken off.
sub growth_csv
{
	my @lines = ('what,who,n,unit,median,least,most');

	foreach my $who ('no-op', 'statbuffer')
	{
		foreach my $s (grep { $_->{group} eq 'growth' && $_->{who} eq $who } @series)
		{
			push @lines, join ',', (map { $s->{$_} } 'what', 'who', 'n', 'unit'),
			  summary(@{ $s->{values} });
		}
	}
	foreach my $s (grep { $_->{group} eq 'growth' && $_->{who} eq 'statbuffer' } @series)
	{
		my @ours = @{ $s->{values} };
		my @noop = values_of("growth $s->{what} no-op $s->{n}");
		next if @ours != @noop;
		push @lines, join ',', $s->{what}, 'difference', $s->{n}, $s->{unit},
		  summary(map { $ours[$_] - $noop[$_] } 0 .. $#ours);
	}
	return @lines;
}

sub latencies_csv
{
	return (
		'load,flush,percentile,median us,least us,most us',
		map {
			join ',', $_->{what} =~ s/^commit-//r, $_->{who} =~ s/-flush$//r,
			  $_->{n}, summary(@{ $_->{values} })
		}
		grep { $_->{group} eq 'growth' && $_->{who} =~ /^with.*-flush$/ && $_->{unit} eq 'us' }
		@series);
}

# Commits of others, and the calls that make the keys, while a buffer grows.
sub commits_csv
{
	return (
		'what,figure,keys,median ms,least ms,most ms',
		map { join ',', $_->{what}, $_->{who}, $_->{n}, summary(@{ $_->{values} }) }
		sort { "$a->{what} $a->{who}" cmp "$b->{what} $b->{who}" || $a->{n} <=> $b->{n} }
		grep { $_->{group} eq 'growth' && $_->{what} =~ /-growing$|-at-once$/ } @series);
}

make_rows();
write_lines('results.csv', results_csv());
write_lines('table.csv', table_csv());
write_lines('table.txt', $about, table_lines(@rows));
write_lines('clients.csv', clients_csv());
write_lines('growth.csv', growth_csv());
write_lines('latencies.csv', latencies_csv());
write_lines('commits.csv', commits_csv());
write_lines('instructions.csv', 'what,who,library,function,instructions', @functions);
print map { "$_\n" } $about, table_lines(grep { $measured{ $_->{group} } } @rows);
