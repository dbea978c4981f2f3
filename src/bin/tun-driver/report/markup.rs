//! Elements of HTML and SVG, written so that XML parsers take them, too. What is put in as text or value is escaped; nothing else can be put in.

use std::fmt::{self, Display, Write};

/// An element under construction.
#[derive(Clone, Debug)]
pub(super) struct Node {
    tag: &'static str,
    attributes: Vec<(&'static str, String)>,
    children: Vec<Child>,
}

#[derive(Clone, Debug)]
enum Child {
    Node(Node),
    Text(String),
}

/// An element without anything in it.
pub(super) fn node(tag: &'static str) -> Node {
    Node {
        tag,
        attributes: Vec::new(),
        children: Vec::new(),
    }
}

impl Node {
    /// With an attribute.
    pub(super) fn with(mut self, name: &'static str, value: impl Display) -> Self {
        self.attributes.push((name, value.to_string()));
        self
    }

    /// With an attribute that is a coordinate or length: to a tenth.
    pub(super) fn at(self, name: &'static str, value: f64) -> Self {
        let told = format!("{value:.1}");
        self.with(name, told.strip_suffix(".0").unwrap_or(&told))
    }

    /// What an attribute says.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(one, _)| *one == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Says something else by an attribute.
    pub(super) fn replace(mut self, name: &'static str, value: impl Display) -> Self {
        self.attributes.retain(|(one, _)| *one != name);
        self.with(name, value)
    }

    pub(super) fn class(self, value: impl Display) -> Self {
        self.with("class", value)
    }

    pub(super) fn text(mut self, text: impl Display) -> Self {
        self.children.push(Child::Text(text.to_string()));
        self
    }

    pub(super) fn child(mut self, child: Node) -> Self {
        self.children.push(Child::Node(child));
        self
    }

    /// As [`child`](Self::child), before those that are there.
    pub(super) fn first(mut self, child: Node) -> Self {
        self.children.insert(0, Child::Node(child));
        self
    }

    pub(super) fn children(mut self, children: impl IntoIterator<Item = Node>) -> Self {
        self.children.extend(children.into_iter().map(Child::Node));
        self
    }
}

impl Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{}", self.tag)?;
        for (name, value) in &self.attributes {
            write!(f, " {name}=\"")?;
            escape(f, value)?;
            f.write_char('"')?;
        }
        // The only elements without an end tag that the report has; all others need one in HTML, also if they are empty.
        if matches!(self.tag, "meta" | "br") {
            return f.write_str("/>");
        }
        f.write_char('>')?;
        for child in &self.children {
            match child {
                Child::Node(node) => {
                    if BLOCKS.contains(&node.tag) {
                        f.write_char('\n')?;
                    }
                    node.fmt(f)?;
                }
                Child::Text(text) => escape(f, text)?,
            }
        }
        write!(f, "</{}>", self.tag)
    }
}

/// Elements that start on a line of their own, so that the file can be read and compared.
const BLOCKS: [&str; 16] = [
    "head", "body", "header", "section", "footer", "div", "figure", "svg", "table", "tr", "h1", "h2", "p", "g", "ul",
    "details",
];

fn escape(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    for character in text.chars() {
        match character {
            '&' => f.write_str("&amp;")?,
            '<' => f.write_str("&lt;")?,
            '>' => f.write_str("&gt;")?,
            '"' => f.write_str("&quot;")?,
            '\n' | '\t' => f.write_char(character)?,
            control if control.is_control() => f.write_char(char::REPLACEMENT_CHARACTER)?,
            other => f.write_char(other)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_put_in_comes_out_as_text() {
        let nasty = "</p><script>alert(\"1\" & '2')</script>\u{0}";
        let told = node("p").with("title", nasty).text(nasty).to_string();
        assert!(!told.contains("<script"), "{told}");
        let parsed = roxmltree::Document::parse(&told).unwrap();
        let expected = nasty.replace('\0', "\u{fffd}");
        assert_eq!(parsed.root_element().text(), Some(&*expected));
        assert_eq!(parsed.root_element().attribute("title"), Some(&*expected));
    }

    #[test]
    fn empty_elements_are_closed_as_html_wants_it() {
        assert_eq!(node("td").to_string(), "<td></td>");
        assert_eq!(
            node("meta").with("charset", "utf-8").to_string(),
            "<meta charset=\"utf-8\"/>"
        );
        assert_eq!(
            node("rect").at("x", 2.0).at("y", 1.26).to_string(),
            "<rect x=\"2\" y=\"1.3\"></rect>"
        );
    }
}
