# A model: what a session should see of a buffer that only it counts in and
# that is not flushed, as long as nothing fails that is not meant to.

package FuzzModel;

use strict;
use warnings;

use Exporter 'import';
use FuzzDraws;
use FuzzSession qw(simple copy_in);
use FuzzStatements;
use FuzzUnits;
use FuzzWorld;

our @EXPORT = qw($client modelled remade short_lived);

# Buffers of clients: as many as there are of these
our $client = 0;

# How often a key is counted when nest() has it counted so deep: a level in
# which the one below fails counts nothing.
sub nested_count
{
	my ($depth) = @_;

	return 1 if $depth == 0;
	return ($depth - 1) % 7 == 3 ? 0 : nested_count($depth - 1) + 1;
}

sub modelled
{
	my $b = "m_$client";
	my @keys = map { "m$_" } 1 .. 3;
	my %published;
	my @levels;    # of the transaction: [savepoint, truncated, { key => count }]
	my $visible = sub {
		my ($key) = @_;
		my $sum = 0;

		# a transaction that has truncated sees only what it has counted since
		foreach my $level (reverse @levels)
		{
			$sum += $level->[2]{$key} // 0;
			return $sum if $level->[1];
		}
		return $sum + ($published{$key} // 0);
	};
	my $add = sub {
		my ($key, $n) = @_;

		if (@levels) { $levels[-1][2]{$key} += $n; }
		else { $published{$key} += $n; }
	};

	# what is in a level goes to the one above it, or is published
	my $merge = sub {
		my (undef, $truncated, $counts) = @{ pop @levels };

		if ($truncated && @levels) { $levels[-1] = [ $levels[-1][0], 1, {} ]; }
		elsif ($truncated) { %published = (); }
		$add->($_, $counts->{$_}) foreach keys %$counts;
	};
	my @messages = (simple('ROLLBACK'), simple("TRUNCATE $b"));
	my $say = sub { push @messages, simple($_[0]); return $messages[-1]; };

	foreach (1 .. number(10, 40))
	{
		my $key = pick(@keys);
		my $n = pick(1, 2, 10, -3, 0, 1 << 41);

		draw(
			8 => sub {
				$say->(pick("SELECT sb_increment('$key', $n, '$b')", "INSERT INTO $b VALUES ('$key', $n)",
					"SELECT try('SELECT sb_increment(''$key'', $n, ''$b'')', 0)", "INSERT INTO v_$b VALUES ('$key', $n)"));
				$add->($key, $n);
			},
			2 => sub {
				my $times = number(1, 200);

				$say->(pick("SELECT sb_increment('$key', $n, '$b') FROM generate_series(1, $times)",
					"INSERT INTO $b SELECT '$key', $n FROM generate_series(1, $times)"));
				$add->($key, $n * $times);
			},
			1 => sub {
				push @messages, copy_in("COPY $b FROM STDIN", "$key\t$n\n$key\t1\n");
				$add->($key, $n + 1);
			},
			2 => sub {
				$say->("SELECT sb_async_increment('$key', $n, '$b')");
				$published{$key} += $n;
			},
			1 => sub { $say->("SELECT try('SELECT sb_increment(''$key'', 7, ''$b''), 1 / 0', " . number(0, 3) . ')') },
			2 => sub {
				my $depth = pick(grep { $_ % 7 != 3 } 1 .. 20);

				$say->("SELECT nest('SELECT sb_increment(''$key'', $n, ''$b'')', $depth)");
				$add->($key, $n * nested_count($depth));
			},
			1 => sub {
				return if @levels;
				$say->("CALL in_a_loop('SELECT sb_increment(''$key'', $n, ''$b'')', 5)");
				$add->($key, 3 * $n);
			},
			1 => sub { $say->("SELECT sb_increment('$key', 7, '$b'), 1 / 0")->{may_fail} = 1 if !@levels; },
			1 => sub {
				$say->(pick("SELECT sb_flush_all('$b')", "SELECT sb_flush('$key', '$b')",
					"ALTER FOREIGN TABLE $b OPTIONS (SET interval '1d')"));
			},
			3 => sub {
				return if @levels;
				$say->('BEGIN' . pick('', '', ' ISOLATION LEVEL SERIALIZABLE'));
				@levels = ([ '', 0, {} ]);
			},
			4 => sub {
				return if !@levels;
				push @levels, [ 's' . @levels, 0, {} ];
				$say->("SAVEPOINT $levels[-1][0]");
			},
			3 => sub {
				return if @levels < 2;
				my $to = number(1, $#levels);

				$say->("ROLLBACK TO $levels[$to][0]");
				splice @levels, $to + 1;
				$levels[$to] = [ $levels[$to][0], 0, {} ];
			},
			2 => sub {
				return if @levels < 2;
				my $to = number(1, $#levels);

				$say->("RELEASE $levels[$to][0]");
				$merge->() while $#levels >= $to;
			},
			2 => sub {
				return if !@levels;
				if (chance(70))
				{
					$say->('COMMIT');
					$merge->() while @levels;
				}
				else
				{
					$say->('ROLLBACK');
					@levels = ();
				}
			},
			1 => sub {
				$say->("TRUNCATE $b");
				if (@levels) { $levels[-1] = [ $levels[-1][0], 1, {} ]; }
				else { %published = (); }
			},
			6 => sub { $say->("SELECT coalesce(sb_count('$key', '$b'), 0)")->{expect} = $visible->($key); },
			4 => sub {
				$say->("SELECT coalesce(string_agg(key || '=' || n, ' ' ORDER BY key), '') FROM $b")->{expect} =
				  join ' ', map { "$_=" . $visible->($_) } grep { $visible->($_) != 0 } @keys;
			});
	}
	$say->('COMMIT');
	return @messages;
}

# What was altered or dropped is made as it was.
sub remade
{
	my $name = draw(
		3 => sub { named('k', pick(@types)) },
		3 => sub { pick(@odd_buffers) },
		2 => sub { pick(@rude) });

	return map { simple($_) } "DROP FOREIGN TABLE IF EXISTS $name, ${name}_x, other.$name CASCADE", definitions($name);
}

# Made, used and dropped in the same transaction
sub short_lived
{
	my $type = pick(@types);
	my $end = pick('COMMIT', 'ROLLBACK');
	my $name = 'l_' . number(1, 3);

	return (
		simple('BEGIN'),
		simple("CREATE FOREIGN TABLE $name (key $type, n bigint DEFAULT 1)"
			  . " SERVER statbuffer OPTIONS (handler 'take', interval '0')"),
		simple("INSERT INTO $name VALUES (" . value($type) . ", 1)"),
		(chance(50) ? simple("SELECT sb_async_increment(" . value($type) . ", 1, '$name')") : ()),
		(chance(30) ? simple("TRUNCATE $name") : ()),
		(chance(30) ? simple(alteration($name)) : ()),
		(chance(30) ? simple("SELECT sb_drain('$name', '10ms')") : ()),
		(chance(30) ? (simple('SAVEPOINT s'), simple("DROP FOREIGN TABLE $name"), simple('ROLLBACK TO s')) : ()),
		simple("SELECT * FROM $name"),
		(chance(50) ? simple("DROP FOREIGN TABLE $name") : ()),
		simple($end),
		simple("SELECT sb_count(" . value($type) . ", '$name')"),
		simple("DROP FOREIGN TABLE IF EXISTS $name"));
}

1;
